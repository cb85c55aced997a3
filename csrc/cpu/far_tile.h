// The far field of one tile: which keys every pool still stands for once the tile has walked its
// blocks, and the pool's mean rows over them.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/query_rows.h"

namespace condensate::cpu {

inline const void* mean_row(const BlockMeans& means, DType dtype, int64_t head, int64_t block) {
    return static_cast<const char*>(means.data) +
           (head * means.stride_head + block * means.stride_block) * dtype_bytes(dtype);
}

// row += sign * block_keys * mean of `block`; `line` holds a row.
inline void add_block(const TileOps& ops, const BlockMeans& means, DType dtype, int64_t kv_len,
                      int64_t head, int64_t block, int dim, float sign, float* line, float* row) {
    ops.load_rows(dtype, mean_row(means, dtype, head, block), 0, 1, dim, line, dim);
    const float keys = sign * static_cast<float>(block_keys(kv_len, block));
    for (int d = 0; d < dim; ++d) row[d] += keys * line[d];
}

// Ascending blocks that a tile has walked.
struct WalkedBlocks {
    const int32_t* begin;
    const int32_t* end;
};

class FarTile {
  public:
    // `line` holds head_dim numbers.
    FarTile(const AttentionParams& params, const TileOps& ops, const Tile& tile,
            WalkedBlocks walked, float* line)
        : far_(params.far_field),
          p_(params.problem),
          ops_(ops),
          head_(tile.flat_kv_head(p_)),
          kv_len_(tile.kv_len),
          far_end_(far_end(tile.ranges(p_), tile.span())),
          width_(far_pool_blocks(tile.kv_len)),
          walked_(walked),
          line_(line) {}

    int64_t pools() const { return ceil_div(far_end_, width_); }

    // Writes pool `pool`'s mean key [dim] and mean value [value_ld] over its condensed keys, and
    // returns how many these are; without any the rows are 0.
    int64_t load(int64_t pool, float* key, float* value, int64_t value_ld) {
        std::fill(key, key + p_.head_dim, 0.0f);
        std::fill(value, value + value_ld, 0.0f);
        if (pool >= pools()) return 0;
        const Part part = part_of(pool);
        if (part.keys == 0) return 0;
        load_mean(far_.key, 0, pool, part, key);
        load_mean(far_.value, 1, pool, part, value);
        return part.keys;
    }

  private:
    // A pool's blocks that lie below far_end, and the walked ones among them.
    struct Part {
        int64_t begin, end;
        bool whole;      // no block of the pool lies at or above far_end
        int64_t summed;  // blocks before it are in the running sum `sum`
        int64_t sum;     // of the pool's, -1 for none
        WalkedBlocks walked;
        int64_t keys;  // of the blocks that are not walked
    };

    Part part_of(int64_t pool) const {
        const int64_t begin = pool * width_;
        const int64_t pool_end = min_i64(begin + width_, num_blocks(kv_len_));
        Part part{begin, min_i64(pool_end, far_end_), pool_end <= far_end_, pool_end, 0, {}, 0};
        part.sum = far_pool_sums(kv_len_) - 1;
        if (!part.whole) {
            part.sum = (part.end - begin) / kFarSumBlocks - 1;
            part.summed = begin + (part.sum + 1) * kFarSumBlocks;
        }
        part.walked.begin = std::lower_bound(walked_.begin, walked_.end, begin);
        part.walked.end = std::lower_bound(part.walked.begin, walked_.end, part.end);
        part.keys = min_i64(part.end * kBlockKeys, kv_len_) - begin * kBlockKeys;
        for (const int32_t* block = part.walked.begin; block != part.walked.end; ++block)
            part.keys -= block_keys(kv_len_, *block);
        return part;
    }

    // `which`: 0 keys, 1 values, as the pools store them.
    void load_mean(const BlockMeans& means, int64_t which, int64_t pool, const Part& part,
                   float* row) {
        const int dim = static_cast<int>(p_.head_dim);
        const int64_t heads = p_.batch * p_.kv_heads;
        const int64_t at = (which * heads + head_) * num_far_pools(kv_len_) + pool;
        if (part.whole && part.walked.begin == part.walked.end) {
            const char* mean =
                static_cast<const char*>(far_.means) + at * dim * dtype_bytes(p_.dtype);
            ops_.load_rows(p_.dtype, mean, 0, 1, dim, row, dim);
            return;
        }
        const int64_t sum = at * far_pool_sums(kv_len_) + part.sum;
        int64_t added = part.summed;  // blocks before it are in `row`
        if (part.sum < 0 || !subtract_walked(means, far_.sums + sum * dim, part, row)) {
            std::fill(row, row + dim, 0.0f);
            added = part.begin;
        }
        add_unwalked(means, part, added, row);
        for (int d = 0; d < dim; ++d)
            row[d] = round_to(p_.dtype, row[d] / static_cast<float>(part.keys));
    }

    // A running sum without its walked blocks. False if that sum is not finite: what a walked block
    // brought into it cannot be taken out again.
    bool subtract_walked(const BlockMeans& means, const float* sum, const Part& part, float* row) {
        const int dim = static_cast<int>(p_.head_dim);
        if (!ops_.load_rows(DType::kFloat32, sum, 0, 1, dim, row, dim)) return false;
        for (const int32_t* block = part.walked.begin;
             block != part.walked.end && *block < part.summed; ++block)
            add_block(ops_, means, p_.dtype, kv_len_, head_, *block, dim, -1.0f, line_, row);
        return true;
    }

    // The blocks from `first` on.
    void add_unwalked(const BlockMeans& means, const Part& part, int64_t first, float* row) {
        const int dim = static_cast<int>(p_.head_dim);
        const int32_t* walked = std::lower_bound(part.walked.begin, part.walked.end, first);
        for (int64_t block = first; block < part.end; ++block) {
            if (walked != part.walked.end && *walked == block)
                ++walked;
            else
                add_block(ops_, means, p_.dtype, kv_len_, head_, block, dim, 1.0f, line_, row);
        }
    }

    const FarField& far_;
    const Problem& p_;
    const TileOps& ops_;
    int64_t head_, kv_len_, far_end_, width_;
    WalkedBlocks walked_;
    float* line_;
};

}  // namespace condensate::cpu
