// Parameters out of a hat, all pointers null: refused, or a call that has nothing to write. Never a
// crash, whatever products of sizes come to. CONDENSATE_FUZZ_CALLS says how many (default a
// million).
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <random>

#include <gtest/gtest.h>

#include "condensate/condensate.h"

namespace condensate::testing {
namespace {

class Hat {
  public:
    // Sizes at which something changes, and others.
    int64_t size() {
        constexpr int64_t kEdges[] = {0,
                                      0,
                                      1,
                                      1,
                                      2,
                                      3,
                                      7,
                                      8,
                                      63,
                                      64,
                                      65,
                                      128,
                                      256,
                                      257,
                                      1 << 20,
                                      1ll << 30,
                                      1ll << 31,
                                      1ll << 32,
                                      1ll << 52,
                                      1ll << 62,
                                      -1,
                                      -64,
                                      INT64_MAX,
                                      INT64_MIN,
                                      (1ll << 31) - 1,
                                      (1ll << 58) / 64};
        return kEdges[random_() % std::size(kEdges)];
    }
    int64_t head_dim() { return random_() % 4 ? 8 * (1 + random_() % 32) : size(); }
    bool flag() { return random_() % 2; }
    DType dtype() { return static_cast<DType>(static_cast<int>(random_() % 5) - 1); }
    Selector selector() { return static_cast<Selector>(static_cast<int>(random_() % 6) - 1); }
    float number() {
        constexpr float kNumbers[] = {0.0f, 1.0f, -1.0f, 0.5f, 1e-45f, INFINITY, -INFINITY, NAN};
        return kNumbers[random_() % std::size(kNumbers)];
    }
    Problem problem() {
        Problem p;
        p.dtype = dtype();
        p.batch = size();
        p.kv_heads = size();
        p.query_heads = p.kv_heads > 0 && p.kv_heads < 1 << 20 ? p.kv_heads * 2 : size();
        p.query_len = size();
        p.kv_len = size();
        p.head_dim = head_dim();
        p.window = size();
        p.anchors = size();
        p.causal = flag();
        p.scale = number();
        return p;
    }

  private:
    std::mt19937_64 random_{20260131};
};

template <class Params>
void fill_key_sizes(Hat& hat, Params* params) {
    params->dtype = hat.dtype();
    params->batch = hat.size();
    params->kv_heads = hat.size();
    params->kv_len = hat.size();
    params->head_dim = hat.head_dim();
}

bool is_empty(const Problem& p) { return p.batch == 0 || p.query_len == 0; }
template <class Params>
bool has_no_keys(const Params& p) {
    return p.batch == 0 || p.kv_heads == 0 || p.kv_len == 0;
}

// A status says what is wrong, or the call had nothing to do.
void expect_refused(const Status& status, bool nothing_to_do) {
    if (status.ok()) {
        EXPECT_TRUE(nothing_to_do) << "a call with null pointers was accepted";
    } else {
        EXPECT_NE(status.message[0], '\0');
    }
}

TEST(HostileParams, AreRefused) {
    const char* wanted = std::getenv("CONDENSATE_FUZZ_CALLS");
    const int64_t calls = wanted ? std::atoll(wanted) : 1000000;
    Hat hat;
    const Executor executor;
    for (int64_t i = 0; i < calls && !::testing::Test::HasFailure(); i += 7) {
        BlockSummaryParams summary;
        fill_key_sizes(hat, &summary);
        summary.selector = hat.selector();
        expect_refused(block_summaries(summary, executor), has_no_keys(summary));

        FarPoolsParams pools;
        fill_key_sizes(hat, &pools);
        pools.key.stride_block = hat.size();
        pools.value.stride_block = hat.size();
        expect_refused(far_pools(pools, executor), has_no_keys(pools));

        BlockSelectParams blocks;
        blocks.problem = hat.problem();
        blocks.selector = hat.selector();
        blocks.max_blocks = hat.size();
        blocks.far_field = hat.flag();
        blocks.top_p = hat.number();
        block_select_workspace_bytes(blocks, executor);
        expect_refused(select_blocks(blocks, executor), is_empty(blocks.problem));

        TokenSelectParams tokens;
        tokens.problem = hat.problem();
        tokens.topk = hat.size();
        expect_refused(select_tokens(tokens, executor), is_empty(tokens.problem));

        AttentionParams attend;
        attend.problem = hat.problem();
        attend.max_blocks = hat.size();
        expect_refused(attention(attend, executor), is_empty(attend.problem));

        OmittedMassParams omitted;
        omitted.problem = hat.problem();
        omitted.num_rows = hat.size();
        expect_refused(omitted_mass(omitted, executor),
                       is_empty(omitted.problem) || omitted.num_rows == 0);

        MergeStatesParams merge;
        merge.dtype = hat.dtype();
        merge.rows = hat.size();
        merge.head_dim = hat.head_dim();
        expect_refused(merge_states(merge, executor), merge.rows == 0);
    }
}

}  // namespace
}  // namespace condensate::testing
