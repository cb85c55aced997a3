// Random calls of the public API over memory that ends where it should, with hostile contents:
// lists, counts, rows, lengths and page tables out of a hat, numbers that may be NaN or infinite.
// Sizes are right, so every call succeeds; under ASan no byte beyond a tensor is touched.
// CONDENSATE_FUZZ_CALLS says how many calls (default 20,000), CONDENSATE_FUZZ_SEED which.
#include <climits>
#include <cstdlib>
#include <iterator>

#include <gtest/gtest.h>

#include "call.h"
#include "condensate/condensate.h"

namespace condensate::testing {
namespace {

int64_t from_environment(const char* name, int64_t otherwise) {
    const char* wanted = std::getenv(name);
    return wanted ? std::atoll(wanted) : otherwise;
}

class Calls {
  public:
    explicit Calls(int64_t seed) : random_(static_cast<uint32_t>(seed)) {}

    // Calls of every function over tensors of one random shape; returns how many.
    int64_t round() {
        made_ = 0;
        Shape shape = random_shape(random_, flag() ? 6 : 200);
        if (shape.group > 8) shape.head_dim = 8;
        shape_ = describe(shape);
        Call call(shape, static_cast<uint32_t>(random_()));
        if (pick(0, 3) == 0) spoil(call);
        call.attention();  // its outputs are what the other stages read
        const Selector selector = static_cast<Selector>(pick(0, 2));
        check(block_summaries(call.block_summaries(selector), executor_));
        select(call, selector);
        attend(call);
        measure(call);
        whole(call);
        decode();
        return made_;
    }

  private:
    int64_t pick(int64_t low, int64_t high) {
        return std::uniform_int_distribution<int64_t>(low, high)(random_);
    }
    bool flag() { return pick(0, 1) == 1; }

    void check(const Status& status) {
        ++made_;
        EXPECT_TRUE(status.ok()) << status.message << " (" << shape_ << ")";
    }

    // An index into `size` things, or one that is wild.
    int32_t index(int64_t size) {
        constexpr int32_t kWild[] = {-1, INT_MIN, INT_MAX, -64, 1 << 30};
        if (pick(0, 3) == 0) return kWild[pick(0, std::size(kWild) - 1)];
        return static_cast<int32_t>(pick(0, size));  // size itself is out of range
    }
    std::vector<int32_t> indices(int64_t count, int64_t size) {
        std::vector<int32_t> result(static_cast<size_t>(count));
        for (int32_t& entry : result) entry = index(size);
        return result;
    }

    // Numbers that are none, among the keys and values.
    void spoil(Call& call) {
        constexpr float kBad[] = {NAN, INFINITY, -INFINITY, 1e38f, 1e-42f};
        for (Tensor* tensor : {&call.query, &call.key, &call.value}) {
            if (tensor->size[2] == 0) continue;
            tensor->set(0, 0, pick(0, tensor->size[2] - 1), pick(0, tensor->size[3] - 1),
                        kBad[pick(0, std::size(kBad) - 1)]);
        }
    }

    void select(Call& call, Selector selector) {
        if (flag()) call.head_keys = indices(call.problem.kv_heads, 300);
        call.top_p = flag() ? 0.0f : 0.9f;
        call.refines_by_keys = flag();
        call.lists_for_far_field = flag();
        check(select_blocks(call.select_blocks(selector, pick(0, 5)), executor_));
        if (flag()) check(attention(call.attention(), executor_));
        check(select_tokens(call.select_tokens(pick(0, 100)), executor_));
        call.max_blocks = 0;
        if (flag()) check(attention(call.attention(), executor_));
        call.threshold.clear();
        call.tie_index.clear();
    }

    void attend(Call& call) {
        call.max_blocks = pick(0, 4);
        call.block_indices =
            indices(call.lists() * call.max_blocks, num_blocks(call.problem.kv_len));
        call.block_counts = indices(call.lists(), call.max_blocks + 1);
        AttentionParams params = call.attention();
        params.block_counts = call.block_counts.data();  // also of lists without places
        check(attention(params, executor_));
        check(far_pools(call.far_pools(), executor_));
        params = call.attention();
        call.estimate.assign(static_cast<size_t>(call.rows()), NAN);
        if (flag()) params.omitted_mass_estimate = call.estimate.data();
        check(attention(params, executor_));
    }

    void measure(Call& call) {
        call.sampled.clear();
        for (int64_t n = pick(0, 4); n > 0; --n)
            call.sampled.push_back(flag() ? pick(0, call.problem.query_len) : index(9));
        check(omitted_mass(call.omitted_mass(), executor_));
        std::vector<float> lse = call.lse;
        check(omitted_from_lse({call.rows(), call.lse.data(), lse.data(), lse.data()}, executor_));
        MergeStatesParams merge;
        merge.dtype = call.problem.dtype;
        merge.rows = call.rows();
        merge.head_dim = call.problem.head_dim;
        merge.out_a = merge.out_b = call.out.data();
        merge.lse_a = merge.lse_b = call.lse.data();
        std::vector<unsigned char> out(call.out.size());
        merge.out = out.data();
        merge.lse = lse.data();
        check(merge_states(merge, executor_));
        uint32_t word = 0;
        check(read_error_word(executor_, flag(), &word));
        EXPECT_EQ(word >> 6, 0u) << "bits that have no name";
    }

    void whole(Call& owner) {
        AttentionCall call;
        const AttentionParams params = owner.attention();
        call.problem = params.problem;
        call.query = params.query;
        call.key = params.key;
        call.value = params.value;
        call.out = params.out;
        call.lse = params.lse;
        call.given_lists = flag();
        call.block_indices = owner.block_indices.data();
        call.block_counts = owner.block_counts.data();
        call.max_blocks = owner.max_blocks;
        call.selector = call.given_lists ? Selector::kBlock : static_cast<Selector>(pick(0, 3));
        const bool lists = call.selector != Selector::kExact;
        call.topk = lists ? 64 * pick(0, 4) : pick(0, 200);
        call.far_field = lists && flag();
        if (lists && flag())
            call.head_keys = owner.head_keys.empty() ? nullptr : owner.head_keys.data();
        if (lists && flag()) call.top_p = 0.5f;
        if ((call.far_field || !call.given_lists) && flag())
            call.omitted_mass_estimate = owner.estimate.data();
        Plan plan;
        check(plan_attention(call, executor_, &plan));
        std::vector<unsigned char> workspace(static_cast<size_t>(plan.workspace_bytes));
        check(run_attention(call, plan, workspace.data(), executor_));
    }

    void decode() {
        constexpr int64_t kHeadDim = 64;
        const int64_t batch = pick(1, 3), kv_heads = pick(1, 2), group = pick(1, 3);
        const bool paged = flag();
        const int64_t page = paged ? 16 * (pick(0, 1) ? 4 : pick(1, 3)) : pick(1, 150);
        const int64_t pages = paged ? pick(1, 5) : batch, columns = paged ? pick(1, 4) : 1;
        const int64_t records = record_rows(page, paged);
        shape_ = "decode, pages of " + std::to_string(page);

        DecodeParams p;
        p.dtype = static_cast<DType>(pick(0, 2));
        p.cache.dtype = flag() ? p.dtype : DType::kFloat8E4M3;
        const int64_t bytes = p.cache.dtype == DType::kFloat8E4M3 ? 1 : dtype_bytes(p.dtype);
        std::vector<unsigned char> key(
            static_cast<size_t>(pages * kv_heads * page * kHeadDim * bytes));
        for (unsigned char& byte : key) byte = static_cast<unsigned char>(pick(0, 1) * 0x3c);
        if (pick(0, 3) == 0) std::fill_n(key.begin() + 64, 64, 0xff);  // NaN
        const std::vector<unsigned char> value = key;
        const std::vector<int32_t> lengths = indices(batch, columns * page + 1);
        const std::vector<int32_t> table = indices(batch * columns, pages);
        p.batch = batch;
        p.kv_heads = kv_heads;
        p.query_heads = kv_heads * group;
        p.query_len = pick(1, 3);
        p.head_dim = kHeadDim;
        p.cache.key = key.data();
        p.cache.value = value.data();
        p.cache.key_stride_token = p.cache.value_stride_token = kHeadDim;
        p.cache.key_stride_head = p.cache.value_stride_head = page * kHeadDim;
        p.cache.key_stride_page = p.cache.value_stride_page = kv_heads * page * kHeadDim;
        p.cache.num_pages = pages;
        p.cache.page_size = page;
        p.cache.block_table = paged ? table.data() : nullptr;
        p.cache.max_pages = columns;
        p.cache.lengths = lengths.data();

        std::vector<int8_t> rows(static_cast<size_t>(pages * kv_heads * records * kHeadDim));
        std::vector<float> scales(static_cast<size_t>(pages * kv_heads * records));
        p.summaries.rows = rows.data();
        p.summaries.scales = scales.data();
        p.summaries.rows_stride_head = records * kHeadDim;
        p.summaries.rows_stride_page = kv_heads * records * kHeadDim;
        p.summaries.scales_stride_head = records;
        p.summaries.scales_stride_page = kv_heads * records;
        UpdateSummariesParams update{batch, kv_heads, kHeadDim, pick(0, 200), p.cache, p.summaries};
        check(update_kv_summaries(update, executor_));

        const Tensor query(p.dtype, batch, p.query_heads, p.query_len, kHeadDim);
        const int64_t count = batch * p.query_heads * p.query_len;
        std::vector<unsigned char> out(
            static_cast<size_t>(count * kHeadDim * dtype_bytes(p.dtype)));
        std::vector<float> lse(static_cast<size_t>(count)), estimate(lse.size());
        p.query = query.view;
        p.out = out.data();
        p.out_stride_seq = kHeadDim;
        p.out_stride_head = p.query_len * kHeadDim;
        p.out_stride_batch = p.query_heads * p.out_stride_head;
        p.lse = lse.data();
        p.mode = static_cast<DecodeMode>(pick(0, 3));
        p.window = pick(0, 40);
        p.anchors = pick(0, 20);
        p.topk = pick(0, 30);
        p.shortlist = 8 * pick(4, 20);
        p.top_p = flag() ? 0.0f : 0.8f;
        p.softcap = flag() ? 0.0f : 5.0f;
        p.far_field = flag();
        if (p.mode == DecodeMode::kSelectAndAttend) p.omitted_mass_estimate = estimate.data();
        const int64_t lists = batch * kv_heads * p.query_len;
        std::vector<int32_t> tokens = indices(lists * p.topk, columns * page);
        std::vector<int32_t> counts = indices(lists, p.topk + 1);
        p.token_indices = tokens.data();
        p.token_counts = counts.data();
        if (p.topk == 0) p.token_indices = nullptr;
        check(attention_with_kvcache(p, executor_));
    }

    std::mt19937 random_;
    const Executor executor_;
    std::string shape_;
    int64_t made_ = 0;
};

TEST(Fuzz, HostileContentsStayInBounds) {
    const int64_t calls = from_environment("CONDENSATE_FUZZ_CALLS", 20000);
    Calls hat(from_environment("CONDENSATE_FUZZ_SEED", 20260131));
    for (int64_t done = 0; done < calls && !::testing::Test::HasFailure();) done += hat.round();
}

}  // namespace
}  // namespace condensate::testing
