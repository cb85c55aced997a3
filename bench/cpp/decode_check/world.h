// A cache with NaN wherever no sequence has a key, pages in random order, and the call over it.
#pragma once

#include "support.h"

namespace condensate::bench {

struct Case {
    const char* name;
    DType dtype, cache;
    int dim, heads, kv_heads, query_len;
    int page;  // 0: contiguous
    bool nhd;
    std::vector<int> lengths;
    float softcap = 0.0f;
    bool sinks = false, hostile = false;
    float scale_sign = 1.0f;
};

struct World {
    const Case& c;
    int64_t batch, capacity, page_size, max_pages, pages;
    Buffer key, value, table, lengths, key_scale, value_scale, query, out, lse, sinks, workspace;
    DecodeParams params;

    static int64_t longest(const Case& c) {
        return *std::max_element(c.lengths.begin(), c.lengths.end());
    }
    explicit World(const Case& c_)
        : c(c_),
          batch(static_cast<int64_t>(c.lengths.size())),
          capacity(c.page ? (longest(c) + 3 * c.page) / c.page * c.page : longest(c) + 5),
          page_size(c.page ? c.page : capacity),
          max_pages(capacity / page_size),
          pages(c.page ? batch * max_pages + 3 : batch),
          key(cache_elems() * bytes_of(c.cache)),
          value(cache_elems() * bytes_of(c.cache)),
          table(4 * batch * max_pages),
          lengths(4 * batch),
          key_scale(4 * c.kv_heads),
          value_scale(4 * c.kv_heads),
          query(2 * batch * c.heads * c.query_len * c.dim),
          out(2 * batch * c.heads * c.query_len * c.dim),
          lse(4 * batch * c.heads * c.query_len),
          sinks(4 * c.heads),
          workspace(std::max<int64_t>(workspace_bytes(), 1)) {
        fill();
        params = make(0, batch);
    }
    int64_t cache_elems() const { return pages * c.kv_heads * page_size * c.dim; }
    int64_t workspace_bytes() {
        DecodeParams p = make(0, batch);
        return kernels::decode::dense_workspace_bytes(p);
    }
    int64_t offset(int64_t page, int64_t head, int64_t slot) const {
        return c.nhd ? ((page * page_size + slot) * c.kv_heads + head) * c.dim
                     : ((page * c.kv_heads + head) * page_size + slot) * c.dim;
    }
    void fill() {
        for (int64_t i = 0; i < cache_elems(); ++i) {
            put(c.cache, key.as<char>(), i, NAN);
            put(c.cache, value.as<char>(), i, NAN);
        }
        std::vector<int> order(pages);
        for (int64_t i = 0; i < pages; ++i) order[i] = static_cast<int>(i);
        for (int64_t i = pages - 1; i > 0; --i)
            std::swap(order[i], order[(g_state = g_state * 1664525u + 7u) % (i + 1)]);
        for (int64_t b = 0; b < batch; ++b) {
            lengths.as<int32_t>()[b] = c.lengths[b];
            for (int64_t i = 0; i < max_pages; ++i)
                table.as<int32_t>()[b * max_pages + i] = order[b * max_pages + i];
            for (int64_t j = 0; j < (c.hostile ? capacity : c.lengths[b]); ++j)
                for (int64_t h = 0; h < c.kv_heads; ++h)
                    for (int d = 0; d < c.dim; ++d) {
                        const int64_t page =
                            c.page ? table.as<int32_t>()[b * max_pages + j / page_size] : b;
                        const int64_t at = offset(page, h, j % page_size) + d;
                        put(c.cache, key.as<char>(), at, normal());
                        put(c.cache, value.as<char>(), at, normal());
                    }
        }
        if (c.hostile) {
            const int bad[] = {-1, INT32_MIN, INT32_MAX, static_cast<int>(pages)};
            for (int i = 0; i < 4; ++i)
                table.as<int32_t>()[i * max_pages + 2 * i % max_pages] = bad[i];
            lengths.as<int32_t>()[4] = -5;
            lengths.as<int32_t>()[5] = INT32_MAX;
        }
        for (int64_t i = 0; i < batch * c.heads * c.query_len * c.dim; ++i)
            put(c.dtype, query.as<char>(), i, normal());
        for (int h = 0; h < c.kv_heads; ++h) {
            key_scale.as<float>()[h] = 0.5f + 0.25f * h;
            value_scale.as<float>()[h] = 1.5f - 0.1f * h;
        }
        for (int h = 0; h < c.heads; ++h) sinks.as<float>()[h] = normal();
        for (Buffer* b : {&key, &value, &table, &lengths, &key_scale, &value_scale, &query, &sinks})
            b->up();
    }
    // Of sequences [first, first + count).
    DecodeParams make(int64_t first, int64_t count) {
        DecodeParams p;
        p.mode = DecodeMode::kDense;
        p.dtype = c.dtype;
        p.batch = count;
        p.query_heads = c.heads;
        p.kv_heads = c.kv_heads;
        p.query_len = c.query_len;
        p.head_dim = c.dim;
        p.scale = c.scale_sign / std::sqrt(static_cast<float>(c.dim));
        p.softcap = c.softcap;
        p.sinks = c.sinks ? reinterpret_cast<float*>(sinks.device) : nullptr;
        const int64_t rows = first * c.heads * c.query_len;
        p.query = {query.device + 2 * rows * c.dim, int64_t{c.heads} * c.query_len * c.dim,
                   int64_t{c.query_len} * c.dim, c.dim};
        p.out = out.device + 2 * rows * c.dim;
        p.out_stride_batch = p.query.stride_batch;
        p.out_stride_head = p.query.stride_head;
        p.out_stride_seq = p.query.stride_seq;
        p.lse = reinterpret_cast<float*>(lse.device) + rows;
        p.workspace = workspace.device;
        KvCache& k = p.cache;
        k.dtype = c.cache;
        k.key = key.device;
        k.value = value.device;
        k.key_stride_page = k.value_stride_page = page_size * c.kv_heads * c.dim;
        k.key_stride_head = k.value_stride_head = c.nhd ? c.dim : page_size * c.dim;
        k.key_stride_token = k.value_stride_token = c.nhd ? int64_t{c.kv_heads} * c.dim : c.dim;
        k.num_pages = pages;
        k.page_size = page_size;
        k.max_pages = max_pages;
        if (c.page) {
            k.block_table = reinterpret_cast<int32_t*>(table.device) + first * max_pages;
        } else {
            k.key = key.device + first * k.key_stride_page * bytes_of(c.cache);
            k.value = value.device + first * k.key_stride_page * bytes_of(c.cache);
            k.num_pages = count;
        }
        k.lengths = reinterpret_cast<int32_t*>(lengths.device) + first;
        if (c.cache == kF8) {
            k.key_scale = reinterpret_cast<float*>(key_scale.device);
            k.value_scale = reinterpret_cast<float*>(value_scale.device);
        }
        return p;
    }
    int64_t bounded(int64_t b) {
        return std::min<int64_t>(std::max(lengths.as<int32_t>()[b], 0), capacity);
    }
};

}  // namespace condensate::bench
