// Parameters out of a hat, all pointers null, to every function of the public API: refused, or a
// call that has nothing to write. Never a crash, whatever products of sizes come to.
// CONDENSATE_FUZZ_CALLS says how many calls (default a million), CONDENSATE_FUZZ_SEED which.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <random>

#include <gtest/gtest.h>

#include "condensate/condensate.h"

namespace condensate::testing {
namespace {

int64_t from_environment(const char* name, int64_t otherwise) {
    const char* wanted = std::getenv(name);
    return wanted ? std::atoll(wanted) : otherwise;
}

class Hat {
  public:
    explicit Hat(int64_t seed) : random_(static_cast<uint64_t>(seed)) {}
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
    // A good size, or one time in eight any.
    int64_t mostly(int64_t good) { return random_() % 8 ? good : size(); }
    float mostly(float good) { return random_() % 8 ? good : number(); }
    DType mostly(DType good) { return random_() % 8 ? good : dtype(); }
    int64_t head_dim() { return random_() % 4 ? 8 * (1 + random_() % 32) : size(); }
    bool flag() { return random_() % 2; }
    DType dtype() { return static_cast<DType>(static_cast<int>(random_() % 6) - 1); }
    DecodeMode mode() { return static_cast<DecodeMode>(static_cast<int>(random_() % 6) - 1); }
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
    // Of lengths that must not be read, since other pointers are null.
    KvCache cache(int64_t batch) {
        static const int32_t kLength = 0;
        KvCache c;
        c.dtype = mostly(DType::kFloat16);
        c.num_pages = mostly(batch);
        c.page_size = mostly(flag() ? int64_t{0} : int64_t{100});
        c.max_pages = mostly(int64_t{1});
        c.lengths = flag() ? nullptr : &kLength;
        return c;
    }

  private:
    std::mt19937_64 random_;
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

// Calls of every function; returns how many.
int64_t stages_by_themselves(Hat& hat, const Executor& executor) {
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

    OmittedFromLseParams from_lse;
    from_lse.rows = hat.size();
    expect_refused(omitted_from_lse(from_lse, executor), from_lse.rows == 0);

    MergeStatesParams merge;
    merge.dtype = hat.dtype();
    merge.rows = hat.size();
    merge.head_dim = hat.head_dim();
    expect_refused(merge_states(merge, executor), merge.rows == 0);
    expect_refused(read_error_word(executor, hat.flag(), nullptr), false);
    return 10;
}

int64_t whole_calls(Hat& hat, const Executor& executor) {
    AttentionCall call;
    call.problem = hat.problem();
    call.selector = hat.selector();
    call.topk = hat.flag() ? 64 : hat.size();
    call.top_p = hat.flag() ? 0.0f : hat.number();
    call.given_lists = hat.flag();
    call.max_blocks = hat.size();
    call.far_field = hat.flag();
    expect_refused(plan_attention(call, executor, nullptr), false);
    Plan plan;
    const Status status = plan_attention(call, executor, &plan);
    if (!status.ok()) expect_refused(status, false);
    expect_refused(run_attention(call, plan, nullptr, executor), is_empty(call.problem));
    return 3;
}

int64_t decoding(Hat& hat, const Executor& executor) {
    DecodeParams decode;
    decode.mode = hat.mode();
    decode.dtype = hat.mostly(DType::kFloat16);
    decode.batch = hat.mostly(int64_t{2});
    decode.kv_heads = hat.mostly(int64_t{2});
    decode.query_heads = hat.flag() ? decode.kv_heads : hat.mostly(int64_t{4});
    decode.query_len = hat.mostly(int64_t{1});
    decode.head_dim = hat.mostly(int64_t{64});
    decode.window = hat.mostly(int64_t{10});
    decode.anchors = hat.mostly(int64_t{4});
    decode.topk = hat.mostly(int64_t{8});
    decode.shortlist = hat.mostly(int64_t{32});
    decode.top_p = hat.mostly(0.5f);
    decode.scale = hat.mostly(1.0f);
    decode.softcap = hat.mostly(0.0f);
    decode.far_field = hat.flag();
    decode.cache = hat.cache(decode.batch);
    decode_workspace_bytes(decode, executor);
    expect_refused(attention_with_kvcache(decode, executor),
                   decode.batch == 0 || decode.query_len == 0);

    UpdateSummariesParams update;
    update.batch = hat.mostly(int64_t{2});
    update.kv_heads = hat.mostly(int64_t{2});
    update.head_dim = hat.mostly(int64_t{64});
    update.appended = hat.mostly(int64_t{3});
    update.cache = hat.cache(update.batch);
    expect_refused(update_kv_summaries(update, executor),
                   update.batch == 0 || update.kv_heads == 0 || update.cache.num_pages == 0 ||
                       update.cache.page_size == 0);
    return 3;
}

TEST(Fuzz, NullPointersAreRefused) {
    const int64_t calls = from_environment("CONDENSATE_FUZZ_CALLS", 1000000);
    Hat hat(from_environment("CONDENSATE_FUZZ_SEED", 20260131));
    const Executor executor;
    for (int64_t done = 0; done < calls && !::testing::Test::HasFailure();) {
        done += stages_by_themselves(hat, executor);
        done += whole_calls(hat, executor);
        done += decoding(hat, executor);
    }
}

}  // namespace
}  // namespace condensate::testing
