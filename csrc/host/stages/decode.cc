// Attention over a cache of keys and values, and the update of its summaries.
#include "host/decode.h"

#include "condensate/condensate.h"
#include "cpu/kernels.h"
#include "host/number.h"
#include "host/run_stage.h"
#include "host/stages/stages.h"
#include "reference/reference.h"

namespace condensate {
namespace {

// A cache's rows move 16 bytes at a time.
bool is_aligned(const KvCache& c) {
    const int64_t bytes = dtype_bytes(c.dtype);
    const int64_t strides[] = {c.key_stride_page,   c.key_stride_head,   c.key_stride_token,
                               c.value_stride_page, c.value_stride_head, c.value_stride_token};
    bool aligned = reinterpret_cast<uintptr_t>(c.key) % 16 == 0 &&
                   reinterpret_cast<uintptr_t>(c.value) % 16 == 0;
    for (const int64_t stride : strides) aligned = aligned && stride * bytes % 16 == 0;
    return aligned;
}
bool is_aligned(const DecodeParams& p) {
    const int64_t bytes = dtype_bytes(p.dtype);
    const auto even = [&](const void* data, int64_t batch, int64_t head, int64_t seq) {
        return reinterpret_cast<uintptr_t>(data) % 16 == 0 && batch * bytes % 16 == 0 &&
               head * bytes % 16 == 0 && seq * bytes % 16 == 0;
    };
    return is_aligned(p.cache) &&
           even(p.query.data, p.query.stride_batch, p.query.stride_head, p.query.stride_seq) &&
           even(p.out, p.out_stride_batch, p.out_stride_head, p.out_stride_seq);
}

const char* cuda_obstacle(const DecodeParams& p, const DeviceFacts& facts) {
    if (const char* obstacle = mma_obstacle(p.dtype, is_aligned(p), facts)) return obstacle;
    if (p.group() > 16) return "more than 16 query heads per KV head";
    if (p.head_dim != 64 && p.head_dim != 96 && p.head_dim != 128 && p.head_dim != 256)
        return "head_dim is none of 64, 96, 128 and 256";
    return nullptr;
}
const char* cuda_obstacle(const UpdateSummariesParams& p, const DeviceFacts& facts) {
    return mma_obstacle(p.cache.dtype, is_aligned(p.cache), facts);
}

int64_t cuda_workspace_bytes([[maybe_unused]] const DecodeParams& p, const DeviceFacts&) {
#if defined(CONDENSATE_WITH_CUDA)
    return kernels::decode_workspace_bytes(p);
#else
    return 0;
#endif
}

}  // namespace

const StageTable<DecodeParams>& table_of(const DecodeParams&) {
    using P = DecodeParams;
    static constexpr StageTable<P> kTable = {
        Stage::kDecode,
        validate,
        [](const P& p) { return p.batch == 0 || p.query_len == 0; },
        [](const P& p) { return Work{p.batch * p.kv_heads * p.query_len, "queries"}; },
        [](const P& p, Plan* plan) {
            plan->selection = p.mode == DecodeMode::kDense         ? Selection::kCovered
                              : p.mode == DecodeMode::kGivenTokens ? Selection::kGiven
                                                                   : Selection::kTokens;
            plan->keys_per_query = p.mode == DecodeMode::kDense
                                       ? p.cache.capacity()
                                       : min_i64(p.anchors + p.window + p.topk, p.cache.capacity());
        },
        [](const P&) { return true; },
        {{Path::kSm80, kByMma, CONDENSATE_CUDA_LAUNCHER(decode_attention), cuda_obstacle, nullptr,
          cuda_workspace_bytes},
         {Path::kCpu, kOnCpu,
          [](const P& p, Launch& launch) {
              return cpu::attention_with_kvcache(p, launch.executor, &launch.errors);
          }},
         {Path::kCpuReference, kOnCpu,
          [](const P& p, Launch& launch) {
              reference::attention_with_kvcache(p, &launch.errors);
              return Status{};
          }}},
        3,
        [](const P& p) { return static_cast<const void*>(p.workspace); }};
    return kTable;
}

const StageTable<UpdateSummariesParams>& table_of(const UpdateSummariesParams&) {
    using P = UpdateSummariesParams;
    static constexpr StageTable<P> kTable = {
        Stage::kUpdateSummaries,
        validate,
        [](const P& p) {
            return p.batch == 0 || p.kv_heads == 0 || p.appended == 0 || p.cache.capacity() == 0;
        },
        [](const P& p) { return Work{p.batch * p.kv_heads, "sequences' KV heads"}; },
        [](const P&, Plan*) {},
        [](const P&) { return true; },
        {{Path::kSm80, kByMma, CONDENSATE_CUDA_LAUNCHER(update_summaries), cuda_obstacle},
         {Path::kCpu, kOnCpu,
          [](const P& p, Launch& launch) {
              return cpu::update_kv_summaries(p, launch.executor, &launch.errors);
          }},
         {Path::kCpuReference, kOnCpu,
          [](const P& p, Launch& launch) {
              reference::update_kv_summaries(p, &launch.errors);
              return Status{};
          }}},
        3};
    return kTable;
}

int64_t decode_workspace_bytes(const DecodeParams& params, const Executor& executor) {
    // The call itself reports what is wrong.
    const bool runs =
        executor.cuda && validate(params).ok() && params.batch > 0 && params.query_len > 0;
    return runs ? cuda_workspace_bytes(params, {}) : 0;
}

Status attention_with_kvcache(const DecodeParams& params, const Executor& executor) {
    return run_alone(params, executor);
}
Status update_kv_summaries(const UpdateSummariesParams& params, const Executor& executor) {
    return run_alone(params, executor);
}

}  // namespace condensate
