#include "host/call.h"

#include <cstring>

#include "host/call_stages.h"
#include "host/run_stage.h"
#include "host/stages/stages.h"
#include "host/status.h"
#include "host/tuning.h"
#include "host/validate.h"

namespace condensate {
namespace {

constexpr char kOp[] = "attention";

// Stands for memory that is not there yet while a call is planned: aligned, never touched.
std::byte* unallocated() { return reinterpret_cast<std::byte*>(std::uintptr_t{1} << 12); }

template <class T>
void stand_in(T** pointer) {
    if (*pointer == nullptr) *pointer = reinterpret_cast<T*>(unallocated());
}

// The call as it is planned: whatever must not be null is not.
AttentionCall with_stand_ins(AttentionCall call) {
    for (ConstTensor4* tensor : {&call.query, &call.key, &call.value}) {
        if (tensor->data == nullptr) tensor->data = unallocated();
    }
    stand_in(&call.out);
    if (call.given_lists) {
        stand_in(&call.block_indices);
        stand_in(&call.block_counts);
    }
    return call;
}

Status check_selector(const AttentionCall& call) {
    auto fault = [](const char* argument, const char* fix) {
        return make_status(StatusCode::kInvalidArgument,
                           "%s: %s is given with selector \"exact\", which selects single keys, "
                           "expected a selector of blocks; %s.",
                           kOp, argument, fix);
    };
    if (selector_traits(call.selector).lists_blocks) return {};
    if (call.far_field) return fault("far_field", "leave it false");
    if (call.head_keys != nullptr) return fault("head_keys", "leave it null");
    if (call.top_p != 0.0f) return fault("top_p", "leave it 0");
    return {};
}

// Sizes first: the rest of the plan divides by them.
Status check_call(const AttentionCall& call) {
    AttentionParams params;
    params.problem = call.problem;
    params.query = call.query;
    params.key = call.key;
    params.value = call.value;
    params.out = call.out;
    params.block_indices = call.given_lists ? call.block_indices : nullptr;
    params.block_counts = call.given_lists ? call.block_counts : nullptr;
    params.max_blocks = call.given_lists ? call.max_blocks : 0;
    if (call.given_lists && !call.far_field)
        params.omitted_mass_estimate = call.omitted_mass_estimate;
    Status status = validate(params);
    if (!status.ok() || call.given_lists) return status;
    status = validate_topk(kOp, call.topk, call.selector);
    // Whether blocks are ranked depends on the length, what the call accepts must not.
    if (status.ok()) status = validate_ranking_scale(kOp, call.problem.scale, call.selector);
    if (status.ok() && call.top_p != 0.0f) status = validate_top_p(kOp, call.top_p, "0");
    if (!status.ok()) return status;
    return check_selector(call);
}

Selection choose_selection(const AttentionCall& call) {
    if (call.given_lists) return Selection::kGiven;
    const Ranges ranges = call.problem.ranges();
    if (call.head_keys == nullptr) {
        if (budget_covers(ranges, call.topk, call.selector)) return Selection::kCovered;
        if (dense_is_faster(ranges, call.problem.query_len, call.topk, call.selector))
            return Selection::kDense;
    }
    return selector_traits(call.selector).lists_blocks ? Selection::kBlocks : Selection::kTokens;
}

int64_t list_width(const AttentionCall& call, Selection selection) {
    if (selection == Selection::kGiven) return call.max_blocks;
    return selection == Selection::kBlocks ? call.topk / kBlockKeys : 0;
}

constexpr int64_t kWord = 4;

// Returns their end.
int64_t lay_out_far_field(const AttentionCall& call, bool makes_key_means, int64_t begin,
                          CallArrays* arrays) {
    const Problem& p = call.problem;
    const int64_t element = dtype_bytes(p.dtype);
    auto rows_of_heads = [&](int64_t rows, int64_t bytes) {
        return array_bytes({p.batch, p.kv_heads, rows, p.head_dim}, bytes);
    };
    Layout layout(begin);
    if (makes_key_means)
        arrays->key_means = layout.reserve(rows_of_heads(num_blocks(p.kv_len), element));
    arrays->value_means = layout.reserve(rows_of_heads(num_blocks(p.kv_len), element));
    arrays->pool_sums = layout.reserve(rows_of_heads(2 * num_far_sums(p.kv_len), kWord));
    arrays->pool_means = layout.reserve(rows_of_heads(2 * num_far_pools(p.kv_len), element));
    return layout.end();
}

// Sets the arrays and the bytes of all but the stages' own workspace.
void lay_out(const AttentionCall& call, Plan* plan) {
    const Problem& p = call.problem;
    const int64_t a_word_a_row = array_bytes({p.batch, p.query_heads, p.query_len}, kWord);
    Layout layout;
    CallArrays& arrays = plan->arrays;
    if (plan->selection == Selection::kTokens) {
        arrays.threshold = layout.reserve(a_word_a_row);
        arrays.tie_index = layout.reserve(a_word_a_row);
        if (call.omitted_mass_estimate && !call.lse) arrays.lse = layout.reserve(a_word_a_row);
    }
    bool makes_key_means = true;
    if (plan->selection == Selection::kBlocks) {
        const int64_t rows = summary_rows(call.selector, p.kv_len);
        const int64_t dim = summary_dim(call.selector, static_cast<int>(p.head_dim));
        const int64_t tiles = num_tiles(p.query_len, p.group());
        const int64_t width = list_width(call, plan->selection);
        arrays.summaries =
            layout.reserve(array_bytes({p.batch, p.kv_heads, rows, dim}, dtype_bytes(p.dtype)));
        arrays.block_indices =
            layout.reserve(array_bytes({p.batch, p.kv_heads, tiles, width}, kWord));
        arrays.block_counts = layout.reserve(array_bytes({p.batch, p.kv_heads, tiles}, kWord));
        makes_key_means = !selector_traits(call.selector).has_block_means;
    }
    arrays.shared = layout.end();
    plan->workspace_bytes = arrays.shared;
    if (call.far_field && !attends_all(plan->selection))
        plan->workspace_bytes = lay_out_far_field(call, makes_key_means, arrays.shared, &arrays);
}

template <class Visit>
Status for_each_stage(const AttentionCall& call, const Plan& plan, void* workspace, Visit visit) {
    return CallStages<Visit>(call, plan, static_cast<std::byte*>(workspace), visit).visit_all();
}

// What no stage says by itself.
void describe_selection(const AttentionCall& call, Plan* plan) {
    const Problem& p = call.problem;
    plan->list_width = list_width(call, plan->selection);
    if (attends_all(plan->selection)) plan->keys_per_query = p.kv_len;
    if (plan->selection != Selection::kGiven) return;
    plan->keys_per_query =
        min_i64(p.kv_len, range_keys(p, call.far_field) + call.max_blocks * kBlockKeys);
}

Status other_plan(const char* what) {
    return make_status(StatusCode::kInvalidArgument,
                       "%s: the plan is of another call (%s), expected the plan of this one; call "
                       "plan_attention with the arguments of run_attention.",
                       kOp, what);
}

// Is `plan` one of this call, so that its arrays fit?
Status check_plan(const AttentionCall& call, const Plan& plan) {
    Plan fresh;
    fresh.selection = choose_selection(call);
    if (fresh.selection != plan.selection || list_width(call, plan.selection) != plan.list_width)
        return other_plan("another selection");
    lay_out(call, &fresh);
    if (fresh.workspace_bytes > plan.workspace_bytes ||
        std::memcmp(&fresh.arrays, &plan.arrays, sizeof(fresh.arrays)) != 0)
        return other_plan("other sizes");
    return {};
}

Status check_workspace(const Plan& plan, const void* workspace) {
    const auto bytes = static_cast<long long>(plan.workspace_bytes);
    if (bytes > 0 && workspace == nullptr)
        return make_status(StatusCode::kInvalidArgument,
                           "%s: workspace is null, expected a pointer to %lld bytes; allocate "
                           "plan.workspace_bytes on the tensors' device.",
                           kOp, bytes);
    if (reinterpret_cast<std::uintptr_t>(workspace) % 16 == 0) return {};
    return make_status(StatusCode::kInvalidArgument,
                       "%s: workspace is %p, expected an address that is a multiple of 16; "
                       "allocate it by itself.",
                       kOp, workspace);
}

// Runs what it visits as the plan says, all stages or one.
struct Runner {
    const Plan& plan;
    const Context& context;
    int only;   // a stage's index, or -1
    int* next;  // index of the stage that is visited next

    template <class Params>
    Status operator()(const Params& params) const {
        const int index = (*next)++;
        if (only >= 0 && index != only) return {};
        const StageTable<Params>& table = table_of(params);
        if (index >= plan.num_stages || plan.stages[index].stage != table.stage)
            return other_plan("other stages");
        const StagePlan& stage = plan.stages[index];
        Status status = table.validate(params);
        if (!status.ok()) return status;
        const Route<Params>* route = table.route(stage.path);
        if (route && route->workspace_bytes &&
            route->workspace_bytes(params, context.facts) > stage.workspace_bytes)
            return other_plan("a larger workspace");
        return run_stage(params, stage, context);
    }
};

bool estimate_is_zero(const AttentionCall& call, const Plan& plan) {
    return call.omitted_mass_estimate && (attends_all(plan.selection) || call.problem.kv_len == 0);
}

Status run_stages(AttentionCall call, const Plan& plan, int only, void* workspace,
                  const Executor& executor) {
    Status status = check_call(call);
    if (!status.ok()) return status;
    clamp_ranges(&call.problem);
    status = check_plan(call, plan);
    if (status.ok()) status = check_workspace(plan, workspace);
    Context context;
    if (status.ok()) status = make_context(executor, &context);
    if (!status.ok()) return status;
    remember_plan(plan);
    if (estimate_is_zero(call, plan)) {
        const Problem& p = call.problem;
        status = fill_with_zero(call.omitted_mass_estimate,
                                p.batch * p.query_heads * p.query_len * kWord, executor);
        call.omitted_mass_estimate = nullptr;
        if (!status.ok()) return status;
    }
    int next = 0;
    return for_each_stage(call, plan, workspace, Runner{plan, context, only, &next});
}

}  // namespace

Status make_plan(const AttentionCall& asked, const DeviceFacts& facts,
                 const Environment& environment, Plan* plan) {
    *plan = {};
    AttentionCall call = with_stand_ins(asked);
    Status status = check_call(call);
    if (!status.ok()) return status;
    clamp_ranges(&call.problem);
    plan->selection = choose_selection(call);
    lay_out(call, plan);
    describe_selection(call, plan);
    if (estimate_is_zero(call, *plan)) call.omitted_mass_estimate = nullptr;
    status = for_each_stage(call, *plan, unallocated(), [&](const auto& params) {
        const Status valid = table_of(params).validate(params);
        return valid.ok() ? plan_stage(params, facts, environment, plan) : valid;
    });
    for (int i = 0; i < plan->num_stages; ++i)
        plan->workspace_bytes =
            max_i64(plan->workspace_bytes, plan->arrays.shared + plan->stages[i].workspace_bytes);
    return status;
}

Status plan_attention(const AttentionCall& call, const Executor& executor, Plan* plan) {
    if (plan == nullptr)
        return make_status(StatusCode::kInvalidArgument,
                           "%s: plan is null, expected a pointer to a Plan; pass the address of "
                           "one.",
                           kOp);
    Context context;
    Status status = make_context(executor, &context);
    return status.ok() ? make_plan(call, context.facts, context.environment, plan) : status;
}

Status run_attention(const AttentionCall& call, const Plan& plan, void* workspace,
                     const Executor& executor) {
    return run_stages(call, plan, /*only=*/-1, workspace, executor);
}

Status run_attention_stage(const AttentionCall& call, const Plan& plan, int index, void* workspace,
                           const Executor& executor) {
    return run_stages(call, plan, index, workspace, executor);
}

}  // namespace condensate
