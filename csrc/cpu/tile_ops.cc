// The one place that asks which instructions this CPU has.
#include "cpu/tile_ops.h"

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

const TileOps& tile_ops() {
    static const TileOps* const widest = [] {
        const TileOps* tables[kMaxTileOps];
        list_tile_ops(tables);
        return tables[0];
    }();
    return *widest;
}

}  // namespace condensate::cpu
