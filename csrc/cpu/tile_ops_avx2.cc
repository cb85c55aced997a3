// Tile operations for x86-64 with AVX2 and FMA.
#include "cpu/tile_ops.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

#pragma GCC push_options
#pragma GCC target("avx2,fma")

namespace condensate::cpu {
namespace {

constexpr int kLanes = 8;
constexpr const char* kName = "avx2";
#include "cpu/tile_ops.inl"

}  // namespace
}  // namespace condensate::cpu

#pragma GCC pop_options

const condensate::cpu::TileOps* condensate::cpu::tile_ops_avx2() { return &kOps; }
#else
const condensate::cpu::TileOps* condensate::cpu::tile_ops_avx2() { return nullptr; }
#endif
