// Rows of a cache for the decoding kernels: where a key of a sequence lies, loads of listed keys
// into float tiles, queries in panels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "condensate/decode.h"
#include "cpu/tile_ops.h"
#include "host/number.h"

namespace condensate::cpu {

inline int64_t cache_length(const KvCache& cache, int64_t batch_index) {
    return max_i64(min_i64(cache.lengths[batch_index], cache.capacity()), 0);
}

// ErrorBit of a sequence's length, and of the pages that its last `keys` keys need.
inline uint32_t cache_errors(const KvCache& cache, int64_t batch_index, int64_t keys) {
    const int64_t length = cache_length(cache, batch_index);
    uint32_t errors = length != cache.lengths[batch_index] ? kErrorCacheLength : 0u;
    if (cache.block_table == nullptr || length == 0 || keys <= 0) return errors;
    const int32_t* table = cache.block_table + batch_index * cache.max_pages;
    const int64_t first = max_i64(length - keys, 0) / cache.page_size;
    for (int64_t n = first; n <= (length - 1) / cache.page_size; ++n)
        if (table[n] < 0 || table[n] >= cache.num_pages) errors |= kErrorBlockTable;
    return errors;
}

// One sequence and KV head of a cache. Its length is within the capacity.
class SequenceRows {
  public:
    SequenceRows(const KvCache& cache, int64_t batch_index, int64_t kv_head, int dim)
        : cache_(cache), batch_index_(batch_index), kv_head_(kv_head), dim_(dim) {}

    // Physical page of a key, or -1 where the table has none.
    int64_t page_of(int64_t key) const {
        if (cache_.block_table == nullptr) return batch_index_;
        const int64_t page =
            cache_.block_table[batch_index_ * cache_.max_pages + key / cache_.page_size];
        return page >= 0 && page < cache_.num_pages ? page : -1;
    }
    int64_t slot_of(int64_t key) const { return key % cache_.page_size; }

    // Keys (values) of `count` positions -> [count][dim]; 0 where the page is missing, which
    // there[n] tells. Returns whether all numbers are finite.
    bool load_keys(const TileOps& ops, const int32_t* keys, int count, float* target,
                   bool* there) const {
        return load(ops, keys, count, cache_.key, cache_.key_stride_page, cache_.key_stride_head,
                    cache_.key_stride_token, target, there);
    }
    // Without the scale of an 8-bit cache.
    bool load_stored_values(const TileOps& ops, const int32_t* keys, int count, float* target,
                            bool* there) const {
        return load(ops, keys, count, cache_.value, cache_.value_stride_page,
                    cache_.value_stride_head, cache_.value_stride_token, target, there);
    }
    bool load_values(const TileOps& ops, const int32_t* keys, int count, float* target,
                     bool* there) const {
        const bool finite = load_stored_values(ops, keys, count, target, there);
        if (cache_.value_scale == nullptr) return finite;
        const float scale = cache_.value_scale[kv_head_];
        for (int64_t n = 0; n < int64_t{count} * dim_; ++n) target[n] *= scale;
        return finite;
    }
    float key_scale() const {
        return cache_.key_scale != nullptr ? cache_.key_scale[kv_head_] : 1.0f;
    }

  private:
    bool load(const TileOps& ops, const int32_t* keys, int count, const void* data, int64_t by_page,
              int64_t by_head, int64_t by_token, float* target, bool* there) const {
        bool finite = true;
        int run = 0;
        for (int n = 0; n < count; n += run) {
            const int64_t page = page_of(keys[n]), slot = slot_of(keys[n]);
            run = 1;
            while (n + run < count && keys[n + run] == keys[n] + run &&
                   slot + run < cache_.page_size)
                ++run;
            std::fill(there + n, there + n + run, page >= 0);
            float* rows = target + int64_t{n} * dim_;
            if (page < 0) {
                std::fill(rows, rows + int64_t{run} * dim_, 0.0f);
                continue;
            }
            const int64_t at = page * by_page + kv_head_ * by_head + slot * by_token;
            const char* source = static_cast<const char*>(data) + at * dtype_bytes(cache_.dtype);
            finite = ops.load_rows(cache_.dtype, source, by_token, run, dim_, rows, dim_) && finite;
        }
        return finite;
    }

    const KvCache& cache_;
    int64_t batch_index_, kv_head_;
    int dim_;
};

// The queries of a tile in the layout that scores them fastest. It depends on the group alone, so
// that a row's scores are the same bits whatever else is in the tile.
class QueryTile {
  public:
    QueryTile(float* memory, int group, int dim)
        : memory_(memory), by_rows_(group <= kFewHeads), dim_(dim) {}

    // Elements that `rows` rows take.
    static int64_t elements(int64_t rows, int dim) {
        return ceil_div(rows, kPanelRows) * kPanelRows * dim;
    }
    void clear(int64_t rows) { std::fill(memory_, memory_ + elements(rows, dim_), 0.0f); }
    void put(const float* row, int r) {
        const int stride = by_rows_ ? 1 : kPanelRows;
        float* at =
            memory_ + (by_rows_ ? int64_t{r} * dim_
                                : int64_t{r / kPanelRows} * dim_ * kPanelRows + r % kPanelRows);
        for (int d = 0; d < dim_; ++d) at[d * stride] = row[d];
    }
    void score(const TileOps& ops, const float* keys, int64_t rows, float scale,
               float* scores) const {
        if (by_rows_)
            ops.score_rows(memory_, keys, dim_, dim_, static_cast<int>(rows), scale, scores);
        else
            ops.score(memory_, keys, dim_, dim_, static_cast<int>(ceil_div(rows, kPanelRows)),
                      scale, scores);
    }

  private:
    static constexpr int kFewHeads = 4;
    float* memory_;
    bool by_rows_;
    int dim_;
};

// Rows that TileOps::accumulate takes at a time.
inline int accumulated_rows(int64_t rows) { return static_cast<int>(ceil_div(rows, 4) * 4); }

// Rounds a row to 8 bits: entries stay in `row`, as floats; returns their scale. In float32 and in
// this order on every path, so that all of them round alike.
float round_row(float* row, int dim);

float capped(float score, float softcap);

}  // namespace condensate::cpu
