#include "reference/far_field.h"

#include "reference/access.h"
#include "reference/reference.h"

namespace condensate::reference {
namespace {

int64_t count_keys(int64_t kv_len, const std::vector<int64_t>& blocks) {
    int64_t keys = 0;
    for (int64_t block : blocks) keys += block_keys(kv_len, block);
    return keys;
}

// Element d of the sum over the keys of `blocks`; `head` counts KV heads of all batches.
template <class Acc>
Acc sum_over_keys(const BlockMeans& means, DType dtype, int64_t kv_len, int64_t head,
                  const std::vector<int64_t>& blocks, int64_t d) {
    Acc sum = 0;
    for (int64_t block : blocks) {
        const int64_t at = head * means.stride_head + block * means.stride_block + d;
        sum += static_cast<Acc>(block_keys(kv_len, block)) *
               static_cast<Acc>(load_number(dtype, means.data, at));
    }
    return sum;
}

// Blocks first..end-1 that the tile does not walk.
std::vector<int64_t> unwalked(const std::vector<char>& walked, int64_t first, int64_t end) {
    std::vector<int64_t> blocks;
    for (int64_t block = first; block < end; ++block)
        if (walked[static_cast<size_t>(block)] == 0) blocks.push_back(block);
    return blocks;
}

}  // namespace

template <class Acc>
std::vector<CondensedPool> condense(const AttentionParams& params, int64_t b, int64_t kv_head,
                                    TileSpan span, const std::vector<char>& walked) {
    const Problem& p = params.problem;
    const int64_t far = far_end(p.ranges(), span), width = far_pool_blocks(p.kv_len);
    const int64_t head = b * p.kv_heads + kv_head;
    std::vector<CondensedPool> pools;
    for (int64_t first = 0; first < far; first += width) {
        const std::vector<int64_t> blocks = unwalked(walked, first, min_i64(first + width, far));
        CondensedPool pool;
        pool.keys = count_keys(p.kv_len, blocks);
        if (pool.keys == 0) continue;
        auto mean = [&](const BlockMeans& means, int64_t d) {
            const Acc sum = sum_over_keys<Acc>(means, p.dtype, p.kv_len, head, blocks, d);
            return round_to(p.dtype, static_cast<float>(sum / static_cast<Acc>(pool.keys)));
        };
        for (int64_t d = 0; d < p.head_dim; ++d) {
            pool.key.push_back(mean(params.far_field.key, d));
            pool.value.push_back(mean(params.far_field.value, d));
        }
        pools.push_back(pool);
    }
    return pools;
}

template <class Acc>
void far_pools(const FarPoolsParams& params) {
    const int64_t width = far_pool_blocks(params.kv_len), pools = num_far_pools(params.kv_len);
    const int64_t heads = params.batch * params.kv_heads, blocks = num_blocks(params.kv_len);
    const std::vector<char> none_walked(static_cast<size_t>(blocks), 0);
    const int64_t running = far_pool_sums(params.kv_len);
    int64_t pool_at = 0;
    for (const BlockMeans* means : {&params.key, &params.value})
        for (int64_t head = 0; head < heads; ++head)
            for (int64_t pool = 0; pool < pools; ++pool) {
                const int64_t first = pool * width, end = min_i64(first + width, blocks);
                auto sum_until = [&](int64_t until, int64_t d) {
                    return sum_over_keys<Acc>(*means, params.dtype, params.kv_len, head,
                                              unwalked(none_walked, first, until), d);
                };
                const Acc keys =
                    static_cast<Acc>(count_keys(params.kv_len, unwalked(none_walked, first, end)));
                for (int64_t d = 0; d < params.head_dim; ++d) {
                    Acc sum = 0;
                    for (int64_t n = 0; n < running; ++n) {
                        const bool last = n + 1 == running;
                        const int64_t until = last ? end : first + (n + 1) * kFarSumBlocks;
                        sum = sum_until(min_i64(until, end), d);  // the last one: of all the pool
                        params.sums[(pool_at * running + n) * params.head_dim + d] =
                            static_cast<float>(sum);
                    }
                    store_number(params.dtype, params.means, pool_at * params.head_dim + d,
                                 static_cast<float>(sum / keys));
                }
                ++pool_at;
            }
}

template std::vector<CondensedPool> condense<float>(const AttentionParams&, int64_t, int64_t,
                                                    TileSpan, const std::vector<char>&);
template std::vector<CondensedPool> condense<double>(const AttentionParams&, int64_t, int64_t,
                                                     TileSpan, const std::vector<char>&);
template void far_pools<float>(const FarPoolsParams&);
template void far_pools<double>(const FarPoolsParams&);

}  // namespace condensate::reference
