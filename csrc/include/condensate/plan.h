// The plan of a call: its stages, the path of each and why, how the work is cut, and the memory it
// takes. What is printed is what runs.
#pragma once

#include <cstdint>
#include <string>

namespace condensate {

// How a stage runs.
enum class Path : int32_t {
    kCpuReference = 0,  // scalar float64, the readable definition
    kCpu = 1,           // vectorised, threaded
    kSm80 = 2,  // mma.sync: float16 and bfloat16, 16-byte aligned, compute capability >= 8.0
    kSimt = 3,  // CUDA cores: every dtype and alignment
    kSm90 = 4,  // wgmma and TMA: compute capability 9.0
};
constexpr Path kPaths[] = {Path::kCpuReference, Path::kCpu, Path::kSm80, Path::kSimt, Path::kSm90};
const char* path_name(Path path);

// One operation of the core, with parameters of its own in params.h.
enum class Stage : int32_t {
    kBlockSummaries = 0,
    kSelectBlocks = 1,
    kSelectTokens = 2,
    kAttention = 3,
    kOmittedMass = 4,
    kMergeStates = 5,
    kFarPools = 6,
    kOmittedFromLse = 7,
    kDecode = 8,
    kUpdateSummaries = 9,
};
const char* stage_name(Stage stage);

// What decides which keys outside anchors and window are attended.
enum class Selection : int32_t {
    kCovered = 0,  // the budget reaches every key: attend to all of them
    kDense = 1,    // attend to all of them, since selecting would not be faster
    kTokens = 2,   // single keys per query and head
    kBlocks = 3,   // one list of blocks per tile
    kGiven = 4,    // lists from the caller
    kNone = 5,     // nothing: anchors and window alone, or a stage that attends to nothing
};
const char* selection_name(Selection selection);
inline bool attends_all(Selection selection) {
    return selection == Selection::kCovered || selection == Selection::kDense;
}

struct StagePlan {
    Stage stage = Stage::kAttention;
    Path path = Path::kCpu;
    const char* reason = "";  // why this path, or what ruled out a faster one
    int64_t work = 0;         // independent pieces of work:
    const char* unit = "";    // "tiles", "blocks", "rows", ...
    int64_t workspace_bytes = 0;
};

// Offsets in bytes of a call's arrays in its workspace; only those that it needs are meaningful.
struct CallArrays {
    int64_t summaries = 0, block_indices = 0, block_counts = 0;             // selection of blocks
    int64_t threshold = 0, tie_index = 0, lse = 0;                          // selection of tokens
    int64_t key_means = 0, value_means = 0, pool_sums = 0, pool_means = 0;  // far field
    int64_t shared = 0;  // the selection's own workspace, then the far field's arrays
};

struct Plan {
    static constexpr int kMaxStages = 8;
    StagePlan stages[kMaxStages];  // in the order they run
    int num_stages = 0;
    Selection selection = Selection::kNone;
    int64_t tile_positions = 0;   // queries of a tile
    int64_t tiles = 0;            // batch * kv_heads * tiles per KV head
    int64_t list_width = 0;       // blocks per list
    int64_t summary_rows = 0;     // per KV head; 0 unless blocks are selected
    int64_t far_pools = 0;        // per KV head; 0 without a far field
    int64_t keys_per_query = 0;   // what a full row attends to one by one, at most
    int64_t workspace_bytes = 0;  // of the whole call
    CallArrays arrays;
};

// Some lines for people: the call's, then one a stage.
std::string to_string(const Plan& plan);

}  // namespace condensate
