// attention() as one call: plan it, allocate what the plan asks for, run it. The operators of the
// Python package are this and nothing else; examples/cpp/attention.cc is a whole program.
//
//     AttentionCall call;              // sizes, tensors, what selects the keys
//     Plan plan;
//     Status status = plan_attention(call, executor, &plan);
//     ... allocate plan.workspace_bytes where the tensors are, aligned to 16 bytes ...
//     status = run_attention(call, plan, workspace, executor);
#pragma once

#include "condensate/params.h"
#include "condensate/plan.h"

namespace condensate {

// Shapes are those of params.h. Of the pointers that must not be null, all may be while planning:
// only strides and the alignment of those that are set count then.
struct AttentionCall {
    Problem problem;
    ConstTensor4 query;  // [B, Hq, Lq, D]
    ConstTensor4 key;    // [B, Hkv, Lk, D]
    ConstTensor4 value;  // [B, Hkv, Lk, D]

    // What is selected: by a selector within a budget ...
    Selector selector = Selector::kBlock;
    int64_t topk = 0;                    // budget in keys; whole blocks where these are listed
    const int32_t* head_keys = nullptr;  // [Hkv] budgets of the KV heads, at most topk; or null
    float top_p = 0.0f;                  // in (0, 1]: mass that lists must hold; 0: topk keys
    // ... or by lists of the caller's, then none of the four above is read.
    bool given_lists = false;
    const int32_t* block_indices = nullptr;  // [B, Hkv, T, K] strictly ascending
    const int32_t* block_counts = nullptr;   // [B, Hkv, T]
    int64_t max_blocks = 0;                  // K

    bool far_field = false;  // condense what is not attended; not with kExact

    void* out = nullptr;                     // [B, Hq, Lq, D] contiguous, dtype
    float* lse = nullptr;                    // [B, Hq, Lq] natural log, or null
    float* omitted_mass_estimate = nullptr;  // [B, Hq, Lq] or null; of given lists only with
                                             // far_field
};

// Checks the call and says how it will run. Reads CONDENSATE_FORCE_PATH.
Status plan_attention(const AttentionCall& call, const Executor& executor, Plan* plan);

// Runs the stages of the plan, which was made for this call: same sizes, same choices, tensors of
// no worse alignment. `workspace` holds plan.workspace_bytes and is free again once the stages have
// run (on CUDA: in stream order).
Status run_attention(const AttentionCall& call, const Plan& plan, void* workspace,
                     const Executor& executor);

// The plan of this thread's last call, or stage run by itself, that was started.
const Plan& last_plan();

}  // namespace condensate
