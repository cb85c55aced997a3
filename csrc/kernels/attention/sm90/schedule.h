// Which tiles a persistent CTA works on, and in what order.
#pragma once

#include <cstdint>

#include "condensate/tile.h"

namespace condensate::kernels::sm90 {

// Some KV heads at a time, as many as share the L2 cache; of them the longest tiles first, dealt
// out to CTAs back and forth, so that every CTA gets about as much.
struct Schedule {
    static constexpr int64_t kSharedBytes = 24 << 20;  // of K and V, which lists of a head share

    // Tiles fit an int: 2^31 of them would be terabytes of queries.
    int tiles_per_head;
    int heads;  // of all batches
    int heads_together;

    static Schedule of(const Problem& p) {
        const int64_t head_bytes = 4 * p.kv_len * p.head_dim;  // K and V of 16 bits
        const int64_t heads = p.batch * p.kv_heads;
        const int64_t fitting = max_i64(1, kSharedBytes / max_i64(1, head_bytes));
        return {static_cast<int>(num_tiles(p.query_len, p.group())), static_cast<int>(heads),
                static_cast<int>(min_i64(heads, fitting))};
    }

    CONDENSATE_HOST_DEVICE int tiles() const { return heads * tiles_per_head; }

    // Calls body(tile) for the tiles of this CTA.
    template <class Body>
    __device__ __forceinline__ void for_each(const Problem& problem, Body&& body) const {
        const int ctas = static_cast<int>(gridDim.x), cta = static_cast<int>(blockIdx.x);
#pragma unroll 1
        for (int round = 0;; ++round) {
            const int rank = round * ctas + (round % 2 ? ctas - 1 - cta : cta);
            if (rank >= tiles()) return;
            body(tile_at(problem, rank));
        }
    }

  private:
    __device__ Tile tile_at(const Problem& problem, int rank) const {
        const int group_tiles = heads_together * tiles_per_head;
        const int first_head = rank / group_tiles * heads_together;
        const int together = min(heads_together, heads - first_head);
        rank %= group_tiles;
        return Tile(problem, first_head + rank % together, tiles_per_head - 1 - rank / together);
    }
};

}  // namespace condensate::kernels::sm90
