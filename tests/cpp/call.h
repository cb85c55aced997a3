// One attention problem with owned memory: random tensors in any dtype and layout, results in
// vectors, and an executor with real threads.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "condensate/condensate.h"
#include "host/number.h"

namespace condensate::testing {

// Numbers stored as a dtype, [batch, heads, seq, dim] with padding between rows and heads.
struct Tensor {
    Tensor() = default;
    Tensor(DType type, int64_t batch, int64_t heads, int64_t seq, int64_t dim, int64_t padding = 0)
        : dtype(type), size{batch, heads, seq, dim} {
        view.stride_seq = dim + padding;
        view.stride_head = seq * view.stride_seq + 3 * padding;
        view.stride_batch = heads * view.stride_head + 5 * padding;
        bytes.assign(static_cast<size_t>((batch * view.stride_batch + 1) * dtype_bytes(type)),
                     0xff);
        view.data = bytes.data();  // 0xff.. is NaN in every dtype: padding must never be read
    }
    Tensor(Tensor&&) = default;
    Tensor& operator=(Tensor&&) = default;

    int64_t at(int64_t b, int64_t h, int64_t i, int64_t d) const {
        return b * view.stride_batch + h * view.stride_head + i * view.stride_seq + d;
    }
    float get(int64_t b, int64_t h, int64_t i, int64_t d) const {
        return load_number(dtype, bytes.data(), at(b, h, i, d));
    }
    void set(int64_t b, int64_t h, int64_t i, int64_t d, float x) {
        store_number(dtype, bytes.data(), at(b, h, i, d), x);
    }
    template <class F>
    void fill(const F& f) {
        for (int64_t b = 0; b < size[0]; ++b)
            for (int64_t h = 0; h < size[1]; ++h)
                for (int64_t i = 0; i < size[2]; ++i)
                    for (int64_t d = 0; d < size[3]; ++d) set(b, h, i, d, f(b, h, i, d));
    }
    // The same numbers in float32, through `f`.
    template <class F>
    Tensor map(const F& f) const {
        Tensor out(DType::kFloat32, size[0], size[1], size[2], size[3]);
        out.fill([&](int64_t b, int64_t h, int64_t i, int64_t d) { return f(get(b, h, i, d)); });
        return out;
    }

    DType dtype = DType::kFloat32;
    int64_t size[4] = {};
    std::vector<unsigned char> bytes;
    ConstTensor4 view;
};

// Splits work over `threads` threads, in reverse order, so that nothing can depend on the order.
template <int kThreads>
void run_on_threads(int64_t n, void (*body)(void*, int64_t, int64_t), void* context) {
    std::vector<std::thread> threads;
    for (int t = kThreads - 1; t >= 0; --t)
        threads.emplace_back([=] { body(context, n * t / kThreads, n * (t + 1) / kThreads); });
    for (std::thread& thread : threads) thread.join();
}
inline Executor threaded() {
    Executor executor;
    executor.parallel_for = run_on_threads<3>;
    return executor;
}

struct Shape {
    DType dtype = DType::kFloat32;
    int64_t batch = 1, kv_heads = 1, group = 1, query_len = 1, kv_len = 1, head_dim = 8;
    int64_t window = 0, anchors = 0;
    bool causal = true;
    int64_t padding = 0;
};

struct Call {
    explicit Call(const Shape& s, uint32_t seed = 1, bool integers = false) {
        problem.dtype = s.dtype;
        problem.batch = s.batch;
        problem.query_heads = s.kv_heads * s.group;
        problem.kv_heads = s.kv_heads;
        problem.query_len = s.query_len;
        problem.kv_len = s.kv_len;
        problem.head_dim = s.head_dim;
        problem.window = s.window;
        problem.anchors = s.anchors;
        problem.causal = s.causal;
        problem.scale = integers ? 1.0f : 1.0f / std::sqrt(static_cast<float>(s.head_dim));
        query = Tensor(s.dtype, s.batch, problem.query_heads, s.query_len, s.head_dim, s.padding);
        key = Tensor(s.dtype, s.batch, s.kv_heads, s.kv_len, s.head_dim, s.padding);
        value = Tensor(s.dtype, s.batch, s.kv_heads, s.kv_len, s.head_dim, s.padding);
        std::mt19937 random(seed);
        std::normal_distribution<float> normal(0.0f, 1.5f);
        std::uniform_int_distribution<int> small(-2, 2);
        auto draw = [&](int64_t, int64_t, int64_t, int64_t) {
            return integers ? static_cast<float>(small(random)) : normal(random);
        };
        for (Tensor* tensor : {&query, &key, &value}) tensor->fill(draw);
    }

    int64_t rows() const { return problem.batch * problem.query_heads * problem.query_len; }
    int64_t lists() const {
        return problem.batch * problem.kv_heads * num_tiles(problem.query_len, problem.group());
    }

    // The parameters of each stage over this call's tensors; outputs are (re)allocated.
    AttentionParams attention() {
        out.assign(static_cast<size_t>(rows() * problem.head_dim * dtype_bytes(problem.dtype)),
                   0xff);
        lse.assign(static_cast<size_t>(rows()), NAN);
        AttentionParams p;
        p.problem = problem;
        p.query = query.view;
        p.key = key.view;
        p.value = value.view;
        p.out = out.data();
        p.lse = lse.data();
        if (max_blocks > 0) {
            p.block_indices = block_indices.data();
            p.block_counts = block_counts.data();
            p.max_blocks = max_blocks;
        }
        if (!threshold.empty()) {
            p.threshold = threshold.data();
            p.tie_index = tie_index.data();
        }
        if (!pool_sums.empty()) {
            p.far_field = {means_of(key_means), means_of(value_means), pool_sums.data(),
                           pool_means.data()};
        }
        return p;
    }
    float out_at(int64_t row, int64_t d) const {
        return load_number(problem.dtype, out.data(), row * problem.head_dim + d);
    }

    TokenSelectParams select_tokens(int64_t topk) {
        threshold.assign(static_cast<size_t>(rows()), NAN);
        tie_index.assign(static_cast<size_t>(rows()), -7);
        lse_full.assign(static_cast<size_t>(rows()), NAN);
        TokenSelectParams p;
        p.problem = problem;
        p.query = query.view;
        p.key = key.view;
        p.topk = topk;
        p.threshold = threshold.data();
        p.tie_index = tie_index.data();
        p.lse_full = lse_full.data();
        return p;
    }

    BlockSummaryParams block_summaries(Selector selector) {
        int64_t dim = summary_dim(selector, static_cast<int>(problem.head_dim));
        int64_t count =
            problem.batch * problem.kv_heads * summary_rows(selector, problem.kv_len) * dim;
        summaries.assign(static_cast<size_t>(count * dtype_bytes(problem.dtype)), 0xff);
        BlockSummaryParams p;
        set_key_sizes(problem, &p);
        p.selector = selector;
        p.key = key.view;
        p.summaries = summaries.data();
        return p;
    }

    // The pools over this call's block means, which are made here. Attention then condenses.
    FarPoolsParams far_pools() {
        Tensor* const sources[] = {&key, &value};
        std::vector<unsigned char>* const targets[] = {&key_means, &value_means};
        for (int which : {0, 1}) {
            BlockSummaryParams p = block_summaries(Selector::kMean);
            p.key = sources[which]->view;
            EXPECT_TRUE(condensate::block_summaries(p, Executor{}).ok());
            *targets[which] = summaries;
        }
        const int64_t count = 2 * problem.batch * problem.kv_heads * problem.head_dim;
        const int64_t mean_bytes =
            count * num_far_pools(problem.kv_len) * dtype_bytes(problem.dtype);
        pool_sums.assign(static_cast<size_t>(count * num_far_sums(problem.kv_len)), NAN);
        pool_means.assign(static_cast<size_t>(mean_bytes), 0xff);
        FarPoolsParams p;
        set_key_sizes(problem, &p);
        p.key = means_of(key_means);
        p.value = means_of(value_means);
        p.sums = pool_sums.data();
        p.means = pool_means.data();
        return p;
    }
    BlockMeans means_of(const std::vector<unsigned char>& rows) const {
        return {rows.data(), num_blocks(problem.kv_len) * problem.head_dim, problem.head_dim};
    }

    BlockSelectParams select_blocks(Selector selector, int64_t width) {
        max_blocks = width;
        block_indices.assign(static_cast<size_t>(lists() * width), -7);
        block_counts.assign(static_cast<size_t>(lists()), -7);
        estimate.assign(static_cast<size_t>(rows()), NAN);
        BlockSelectParams p;
        p.problem = problem;
        p.selector = selector;
        p.query = query.view;
        p.summaries = summaries.data();
        p.max_blocks = width;
        p.block_indices = block_indices.data();
        p.block_counts = block_counts.data();
        p.omitted_mass_estimate = estimate.data();
        if (refines_by_keys) p.key = key.view;
        p.far_field = lists_for_far_field;
        if (!head_keys.empty()) p.head_keys = head_keys.data();
        p.top_p = top_p;
        return p;
    }

    OmittedMassParams omitted_mass() {
        int64_t audited =
            sampled.empty() ? problem.query_len : static_cast<int64_t>(sampled.size());
        omitted.assign(static_cast<size_t>(problem.batch * problem.query_heads * audited), NAN);
        OmittedMassParams p;
        p.problem = problem;
        p.query = query.view;
        p.key = key.view;
        p.lse = lse.data();
        p.rows = sampled.empty() ? nullptr : sampled.data();
        p.num_rows = audited;
        p.omitted = omitted.data();
        return p;
    }

    Problem problem;
    Tensor query, key, value;
    int64_t max_blocks = 0;
    bool refines_by_keys = false;  // select_blocks is given the keys
    bool lists_for_far_field = false;
    std::vector<int32_t> head_keys;  // budgets of select_blocks, if any
    float top_p = 0.0f;
    std::vector<unsigned char> out, summaries, key_means, value_means, pool_means;
    std::vector<int32_t> block_indices, block_counts, tie_index;
    std::vector<float> lse, threshold, lse_full, estimate, omitted, pool_sums;
    std::vector<int64_t> sampled;
};

inline std::string describe(const Shape& s) {
    return "dtype " + std::to_string(static_cast<int>(s.dtype)) + " B" + std::to_string(s.batch) +
           " KV" + std::to_string(s.kv_heads) + " G" + std::to_string(s.group) + " Lq" +
           std::to_string(s.query_len) + " Lk" + std::to_string(s.kv_len) + " D" +
           std::to_string(s.head_dim) + " w" + std::to_string(s.window) + " a" +
           std::to_string(s.anchors) + " causal" + std::to_string(s.causal);
}

inline Shape random_shape(std::mt19937& random, int64_t longest) {
    auto pick = [&](int64_t low, int64_t high) {
        return std::uniform_int_distribution<int64_t>(low, high)(random);
    };
    Shape s;
    s.dtype = static_cast<DType>(pick(0, 2));
    s.batch = pick(1, 2);
    s.kv_heads = pick(1, 2);
    const int64_t groups[] = {1, 1, 2, 3, 4, 8, 17, 64};
    s.group = groups[pick(0, 7)];
    s.query_len = s.group > 8 ? pick(1, 9) : pick(1, longest / 2);
    s.kv_len = pick(0, 9) == 0 ? pick(0, 3) : pick(1, longest);
    s.head_dim = 8 * (pick(0, 5) == 0 ? pick(1, 32) : pick(1, 8));
    s.window = pick(0, 3) == 0 ? 0 : pick(0, 100);
    s.anchors = pick(0, 2) == 0 ? 0 : pick(0, 90);
    s.causal = pick(0, 2) != 0;
    s.padding = pick(0, 1) * pick(0, 5);
    return s;
}

}  // namespace condensate::testing
