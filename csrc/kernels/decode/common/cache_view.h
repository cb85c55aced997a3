// Where the keys, values and summaries of one sequence and KV head lie. Pages are read from the
// block table and bounded: a page out of range is -1, and its keys do not exist.
#pragma once

#include "condensate/decode.h"

namespace condensate::kernels::decode {

template <class CacheT>
struct CacheView {
    const CacheT* key;  // of the head
    const CacheT* value;
    const int8_t* rows;  // summaries of the head
    const float* scales;
    const int32_t* table;  // of the sequence, or null
    int64_t key_stride_page, key_stride_token;
    int64_t value_stride_page, value_stride_token;
    int64_t rows_stride_page, scales_stride_page;
    int32_t own_page;  // without a table
    int32_t num_pages;
    int32_t page_shift;  // log2 of the page's tokens; without a table no key lies in a second page
    int32_t pool_shift;  // log2 of the keys of a pool
    int32_t unit_rows;   // of a record; its pools come behind them

    __device__ CacheView(const KvCache& cache, const KvSummaries& summaries, int64_t sequence,
                         int64_t kv_head) {
        key = static_cast<const CacheT*>(cache.key) + kv_head * cache.key_stride_head;
        value = static_cast<const CacheT*>(cache.value) + kv_head * cache.value_stride_head;
        rows = summaries.rows + kv_head * summaries.rows_stride_head;
        scales = summaries.scales + kv_head * summaries.scales_stride_head;
        const bool paged = cache.block_table != nullptr;
        table = paged ? cache.block_table + sequence * cache.max_pages : nullptr;
        key_stride_page = cache.key_stride_page;
        key_stride_token = cache.key_stride_token;
        value_stride_page = cache.value_stride_page;
        value_stride_token = cache.value_stride_token;
        rows_stride_page = summaries.rows_stride_page;
        scales_stride_page = summaries.scales_stride_page;
        own_page = static_cast<int32_t>(sequence);
        num_pages = static_cast<int32_t>(cache.num_pages);
        page_shift = paged ? 31 - __clz(static_cast<int>(cache.page_size)) : 31;
        pool_shift = 31 - __clz(pool_keys(cache.page_size, paged));
        unit_rows = static_cast<int32_t>(condensate::unit_rows(cache.page_size));
    }

    __device__ int32_t page_of(int32_t token) const {
        if (table == nullptr) return own_page;
        const int32_t page = table[token >> page_shift];
        return static_cast<uint32_t>(page) < static_cast<uint32_t>(num_pages) ? page : -1;
    }
    __device__ int32_t slot_of(int32_t token) const {
        return token & static_cast<int32_t>((1u << page_shift) - 1u);
    }
    __device__ const CacheT* key_row(int32_t page, int32_t token) const {
        return key + page * key_stride_page + slot_of(token) * key_stride_token;
    }
    __device__ const CacheT* value_row(int32_t page, int32_t token) const {
        return value + page * value_stride_page + slot_of(token) * value_stride_token;
    }
    // Row of the record that holds the unit, or pool, of this token.
    __device__ int32_t unit_row(int32_t token) const { return slot_of(token) / kUnitKeys; }
    __device__ int32_t pool_row(int32_t token) const {
        return unit_rows + (slot_of(token) >> pool_shift);
    }
};

}  // namespace condensate::kernels::decode
