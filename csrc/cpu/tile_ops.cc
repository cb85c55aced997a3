// The one place that asks which instructions this CPU has.
#include "cpu/tile_ops.h"

#include <cstdlib>
#include <cstring>
#include <string>

#include "cpu/kernels.h"
#include "host/status.h"

namespace condensate::cpu {
namespace {

bool has_avx2() {
#if defined(__x86_64__) && defined(__GNUC__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return false;
#endif
}

bool has_avx512() {
#if defined(__x86_64__) && defined(__GNUC__)
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
    return false;
#endif
}

}  // namespace

void list_tile_ops(const TileOps* tables[kMaxTileOps]) {
    int count = 0;
    if (has_avx512() && tile_ops_avx512() != nullptr) tables[count++] = tile_ops_avx512();
    if (has_avx2() && tile_ops_avx2() != nullptr) tables[count++] = tile_ops_avx2();
    tables[count++] = tile_ops_baseline();
    while (count < kMaxTileOps) tables[count++] = nullptr;
}

const TileOps* find_tile_ops() {
    const TileOps* tables[kMaxTileOps];
    list_tile_ops(tables);
    const char* wanted = std::getenv("CONDENSATE_CPU_ISA");
    if (wanted == nullptr || wanted[0] == '\0') return tables[0];
    for (const TileOps* table : tables)
        if (table != nullptr && std::strcmp(table->name, wanted) == 0) return table;
    return nullptr;
}

const TileOps& tile_ops() {
    const TileOps* found = find_tile_ops();
    return found != nullptr ? *found : *tile_ops_baseline();
}

Status check_isa() {
    if (find_tile_ops() != nullptr) return {};
    const TileOps* tables[kMaxTileOps];
    list_tile_ops(tables);
    std::string names;
    for (const TileOps* table : tables)
        if (table != nullptr) names += std::string(names.empty() ? "" : ", ") + table->name;
    return make_status(StatusCode::kInvalidArgument,
                       "CONDENSATE_CPU_ISA is \"%.64s\", expected one of %s on this machine; unset "
                       "it to use the widest.",
                       std::getenv("CONDENSATE_CPU_ISA"), names.c_str());
}

const char* isa_name() { return tile_ops().name; }

}  // namespace condensate::cpu
