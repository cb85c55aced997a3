// The plan of a call: which path runs, why, and how the work is cut. A pure function of shapes,
// policy and device facts, so every choice can be tested without a device.
#pragma once

#include <cstdint>
#include <string>

#include "condensate/params.h"

namespace condensate {

enum class Path : int32_t {
    kCpuReference = 0,  // scalar float64, the readable definition
    kCpu = 1,           // vectorised, threaded
    kSm80 = 2,  // mma.sync: float16 and bfloat16, 16-byte aligned, compute capability >= 8.0
    kSimt = 3,  // CUDA cores: every dtype and alignment
    kSm90 = 4,  // wgmma and the copy engine: compute capability 9.0
};
const char* path_name(Path path);

enum class Stage : int32_t {
    kBlockSummaries = 0,
    kSelectBlocks = 1,
    kSelectTokens = 2,
    kAttention = 3,
    kOmittedMass = 4,
    kMergeStates = 5,
    kFarPools = 6,
};
const char* stage_name(Stage stage);

// What decides which keys outside anchors and window are attended.
enum class Selection : int32_t {
    kCovered = 0,  // the budget reaches every key: attend to all of them
    kDense = 1,    // attend to all of them, since selecting would not be faster
    kTokens = 2,   // single keys per query and head
    kBlocks = 3,   // one list of blocks per tile
    kGiven = 4,    // lists from the caller
    kNone = 5,     // nothing is selected: topk is 0, or the stage does not select
};
const char* selection_name(Selection selection);

// What a plan may know of a device; all zero for the CPU.
struct DeviceFacts {
    bool cuda = false;
    int index = 0;
    int sm_major = 0;
    int sm_minor = 0;
    int sm_count = 0;
    int max_smem_per_block_bytes = 0;  // opt-in limit
    bool sm90a_kernels = false;        // this build holds them
};

// CONDENSATE_FORCE_PATH as read by policy_from_environment().
struct Policy {
    bool forced = false;
    Path path = Path::kCpu;  // meaningful when forced
};

struct PlanRequest {
    Stage stage = Stage::kAttention;
    Problem problem;
    Selector selector = Selector::kBlock;
    int64_t topk = 0;           // the budget in keys; not used with given lists or tokens
    bool given_lists = false;   // block lists are passed in
    int64_t max_blocks = 0;     // their width
    bool given_tokens = false;  // thresholds of select_tokens are passed in
    bool far_field = false;     // attention works on whole blocks and condenses the others
    bool aligned = true;        // every data pointer and stride is a multiple of 16 bytes
    bool boxed = true;  // no extent above 1 has a stride below 1: the copy engine can read it
};

struct Plan {
    Stage stage = Stage::kAttention;
    Path path = Path::kCpu;
    char reason[192] = {};  // why this path, and what ruled out the one before it
    Selection selection = Selection::kNone;
    int64_t tile_positions = 0;
    int64_t tiles = 0;            // batch * kv_heads * tiles per KV head: the units of work
    int64_t list_width = 0;       // blocks per list
    int64_t summary_rows = 0;     // per KV head; 0 unless blocks are selected
    int64_t far_pools = 0;        // per KV head; 0 without a far field
    int64_t keys_per_query = 0;   // what a full row attends to one by one, at most
    int64_t workspace_bytes = 0;  // scratch of the block selection; filled in by plan_call
};

// Fails when a forced path is unknown or cannot run the call.
Status policy_from_environment(Policy* policy);
Status make_plan(const PlanRequest& request, const DeviceFacts& facts, const Policy& policy,
                 Plan* plan);

// One line, stable enough to test against.
std::string to_string(const Plan& plan);

// Are data and strides multiples of 16 bytes, as the vector loads of the sm80 path need?
bool is_aligned16(const ConstTensor4& tensor, DType dtype);
bool is_aligned16(const FarField& far, DType dtype);
bool is_aligned16(const void* data);
// Can the copy engine cut boxes out of a [batch, heads, length, D] tensor with these strides?
bool is_boxed(const ConstTensor4& tensor, int64_t batch, int64_t heads, int64_t length);

}  // namespace condensate
