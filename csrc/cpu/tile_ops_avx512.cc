// Tile operations for x86-64 with AVX-512 (F, BW, DQ, VL).
#include "cpu/tile_ops.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")

namespace condensate::cpu {
namespace {

constexpr int kLanes = 16;
constexpr const char* kName = "avx512";
#include "cpu/tile_ops.inl"

}  // namespace
}  // namespace condensate::cpu

#pragma GCC pop_options

const condensate::cpu::TileOps* condensate::cpu::tile_ops_avx512() { return &kOps; }
#else
const condensate::cpu::TileOps* condensate::cpu::tile_ops_avx512() { return nullptr; }
#endif
