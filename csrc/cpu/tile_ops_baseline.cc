// Tile operations for any machine: 16-byte vectors.
#include "cpu/tile_ops.h"

namespace condensate::cpu {
namespace {

constexpr int kLanes = 4;
constexpr const char* kName = "baseline";
#include "cpu/tile_ops.inl"

}  // namespace

const TileOps* tile_ops_baseline() { return &kOps; }

}  // namespace condensate::cpu
