// What calls leave behind lives beside the kernels, in this library, so it is read through it: C
// functions that python/condensate_ext/diagnostics.py calls. No operators: a compiled graph must
// not contain them.
#include <algorithm>
#include <cstring>
#include <string>

#include "condensate/condensate.h"
#include "torch/tensor_args.h"

namespace condensate {
namespace {

void copy_text(const std::string& text, char* out, int64_t out_bytes) {
    if (out_bytes <= 0) return;
    const size_t size = std::min(text.size(), static_cast<size_t>(out_bytes) - 1);
    std::memcpy(out, text.data(), size);
    out[size] = '\0';
}

std::string quoted(const std::string& text) {  // no text of a plan holds a quote
    std::string result = "\"";
    for (char c : text) result += c == '\n' ? std::string("\\n") : std::string(1, c);
    return result + "\"";
}

std::string field(const char* name, const std::string& value) {
    return quoted(name) + ": " + value + ", ";
}
std::string field(const char* name, int64_t value) { return field(name, std::to_string(value)); }

std::string to_json(const StagePlan& stage) {
    return "{" + field("stage", quoted(stage_name(stage.stage))) +
           field("path", quoted(path_name(stage.path))) + field("reason", quoted(stage.reason)) +
           field("work", stage.work) + field("unit", quoted(stage.unit)) +
           "\"workspace_bytes\": " + std::to_string(stage.workspace_bytes) + "}";
}

// The fields of diagnostics.py's Plan.
std::string to_json(const Plan& plan) {
    std::string stages;
    for (int i = 0; i < plan.num_stages; ++i)
        stages += (i > 0 ? ", " : "") + to_json(plan.stages[i]);
    return "{" + field("selection", quoted(selection_name(plan.selection))) +
           field("stages", "[" + stages + "]") + field("keys_per_query", plan.keys_per_query) +
           field("list_width", plan.list_width) + field("summary_rows", plan.summary_rows) +
           field("far_pools", plan.far_pools) + field("tiles", plan.tiles) +
           field("tile_positions", plan.tile_positions) +
           field("workspace_bytes", plan.workspace_bytes) + "\"text\": " + quoted(to_string(plan)) +
           "}";
}

ConstTensor4 contiguous(int64_t heads, int64_t length, int64_t head_dim) {
    return {nullptr, heads * length * head_dim, length * head_dim, head_dim};
}

}  // namespace
}  // namespace condensate

#define CONDENSATE_EXPORT extern "C" __attribute__((visibility("default")))

// Returns a StatusCode; `message` receives the text of one that is not kOk. Device -1 is the CPU.
CONDENSATE_EXPORT int32_t condensate_read_error_word(int32_t device_index, int32_t clear,
                                                     uint32_t* word, char* message,
                                                     int64_t message_bytes) {
    using namespace condensate;
    Executor executor;
    Status status;
    if (device_index >= 0) status = ops::make_cuda_executor(device_index, &executor);
    if (status.ok()) status = read_error_word(executor, clear != 0, word);
    copy_text(status.message, message, message_bytes);
    return static_cast<int32_t>(status.code);
}

// The plan of this thread's last call, as JSON.
CONDENSATE_EXPORT void condensate_last_plan(char* text, int64_t text_bytes) {
    using namespace condensate;
    copy_text(to_json(last_plan()), text, text_bytes);
}

// Arguments of attention() over contiguous tensors. Enumerations and flags are numbers.
struct CondensateShapes {
    int64_t dtype, batch, query_heads, kv_heads, query_len, kv_len, head_dim;
    int64_t window, anchors, topk, selector, causal, far_field, estimate;
};

// The plan of such a call, as JSON; or, with a StatusCode that is not kOk, its message.
CONDENSATE_EXPORT int32_t condensate_plan(const CondensateShapes* shapes, int32_t device_index,
                                          char* text, int64_t text_bytes) {
    using namespace condensate;
    const CondensateShapes& s = *shapes;
    AttentionCall call;
    call.problem.dtype = static_cast<DType>(s.dtype);
    call.problem.batch = s.batch;
    call.problem.query_heads = s.query_heads;
    call.problem.kv_heads = s.kv_heads;
    call.problem.query_len = s.query_len;
    call.problem.kv_len = s.kv_len;
    call.problem.head_dim = s.head_dim;
    call.problem.window = s.window;
    call.problem.anchors = s.anchors;
    call.problem.causal = s.causal != 0;
    call.query = contiguous(s.query_heads, s.query_len, s.head_dim);
    call.key = call.value = contiguous(s.kv_heads, s.kv_len, s.head_dim);
    call.selector = static_cast<Selector>(s.selector);
    call.topk = s.topk;
    call.far_field = s.far_field != 0;
    float unused = 0.0f;  // stands for memory of the caller's
    if (s.estimate != 0) call.lse = call.omitted_mass_estimate = &unused;
    Executor executor;
    executor.cuda = device_index >= 0;
    executor.device_index = device_index;
    Plan plan;
    const Status status = plan_attention(call, executor, &plan);
    copy_text(status.ok() ? to_json(plan) : std::string(status.message), text, text_bytes);
    return static_cast<int32_t>(status.code);
}
