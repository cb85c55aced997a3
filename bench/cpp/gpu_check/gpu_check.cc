// Calls on CUDA as users make them, with small awkward shapes and hostile contents, for
// compute-sanitizer. Outputs are poisoned first; attention is compared with the CPU's on the same
// lists.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "host/number.h"
#include "stage_data.h"

namespace condensate::bench {
namespace {

struct Case {
    const char* name;
    Shape shape;
};

// B, Hq, Hkv, Lq, Lk, D, window, anchors, topk, causal
const Case kCases[] = {
    {"ragged_group3_d72", {2, 6, 2, 130, 197, 72, 50, 5, 64, true}},
    {"group4_d128_full_blocks", {1, 8, 2, 96, 700, 128, 100, 64, 192, true}},
    {"more_queries_than_keys", {1, 4, 2, 150, 70, 64, 16, 3, 64, true}},
    {"bidirectional_d256", {1, 2, 2, 65, 321, 256, 40, 1, 64, false}},
    {"group64_decode", {1, 64, 1, 1, 333, 96, 32, 0, 128, true}},
    {"one_key_d8", {1, 1, 1, 3, 1, 8, 1, 0, 64, true}},
    {"no_keys", {1, 2, 1, 3, 0, 64, 8, 0, 64, true}},
    {"no_window", {1, 3, 3, 129, 257, 40, 0, 2, 64, true}},
    {"more_blocks_than_a_shortlist", {1, 4, 1, 40, 5000, 64, 20, 3, 64, true}},
    {"pools_of_two_blocks", {1, 8, 2, 40, 9000, 128, 100, 64, 640, true}},
};

constexpr float kTolerance = 0.06f;  // two 16-bit outputs of size 4; not the correctness test

constexpr char kForcePath[] = "CONDENSATE_FORCE_PATH";

int g_checks = 0;
int g_failures = 0;
const char* g_path = "";  // the CUDA path under test

void expect(bool holds, const std::string& where, const char* what) {
    ++g_checks;
    if (holds) return;
    ++g_failures;
    std::printf("FAILED %s: %s\n", where.c_str(), what);
}

void expect_ok(const Status& status, const std::string& where) {
    expect(status.ok(), where, status.ok() ? "" : status.message);
}

// The forced path is one of CUDA's, so the CPU runs without it.
template <class Run>
Status run_on_cpu(StageData* cpu, Run run) {
    setenv(kForcePath, "", /*overwrite=*/1);
    Status status = (cpu->*run)();
    setenv(kForcePath, g_path, /*overwrite=*/1);
    return status;
}

float largest_difference(DType dtype, const Buffer& a, const Buffer& b) {
    std::vector<uint8_t> left = a.read(), right = b.read();
    float largest = 0;
    for (int64_t i = 0; i < a.bytes() / dtype_bytes(dtype); ++i) {
        float x = load_number(dtype, left.data(), i), y = load_number(dtype, right.data(), i);
        float difference = x == y ? 0.0f : std::fabs(x - y);  // equal infinities differ by 0
        if (!(difference <= largest)) largest = difference;   // a NaN stays
    }
    return largest;
}

void poison(StageData* data) {
    for (Buffer* buffer : {&data->out, &data->lse, &data->omitted, &data->merged_out,
                           &data->merged_lse, &data->estimate})
        buffer->fill(0xff);
}

void expect_same_attention(const StageData& gpu, const StageData& cpu, const std::string& where) {
    expect(largest_difference(gpu.shape().dtype, gpu.out, cpu.out) <= kTolerance, where,
           "the output differs from the CPU's");
    expect(largest_difference(DType::kFloat32, gpu.lse, cpu.lse) <= kTolerance, where,
           "the LSE differs from the CPU's");
}

// The lists that the call has made on the GPU become the CPU's given ones.
void adopt_lists(const StageData& gpu, StageData* cpu) {
    const std::vector<uint8_t> memory = gpu.workspace.read();
    const CallArrays& arrays = gpu.plan().arrays;
    const std::pair<Buffer*, int64_t> lists[] = {{&cpu->block_indices, arrays.block_indices},
                                                 {&cpu->block_counts, arrays.block_counts}};
    for (const auto& [buffer, offset] : lists)
        if (buffer->bytes() > 0) buffer->write(memory.data() + offset, 0, buffer->bytes());
}

// Attention over the lists that both have, without and with the far field and its estimate.
void check_given(StageData* gpu, StageData* cpu, const std::string& where) {
    poison(gpu);
    expect_ok(gpu->run_given_lists(), where + " lists");
    expect_ok(run_on_cpu(cpu, &StageData::run_given_lists), where + " lists (CPU)");
    expect_same_attention(*gpu, *cpu, where + " lists");
    poison(gpu);
    expect_ok(gpu->run_given_far(), where + " far field");
    expect_ok(run_on_cpu(cpu, &StageData::run_given_far), where + " far field (CPU)");
    expect_same_attention(*gpu, *cpu, where + " far field");
    expect(largest_difference(DType::kFloat32, gpu->estimate, cpu->estimate) <= kTolerance, where,
           "the estimate differs from the CPU's");
}

void check_rest(StageData* gpu, const std::string& where) {
    expect_ok(gpu->run_omitted_mass(), where + " omitted_mass");
    expect_ok(gpu->run_merge_states(), where + " merge_states");
    expect(largest_difference(gpu->shape().dtype, gpu->merged_out, gpu->out) <= kTolerance, where,
           "merging a state with itself moved the output");
}

// Lists that no caller should pass: negative, huge, repeated, descending, with wrong counts.
void write_hostile_lists(StageData* data) {
    const int32_t entries[] = {-1, 0x7fffffff, 1, 1, 0, -0x7fffffff - 1, 2, 1 << 30};
    const int32_t counts[] = {1000000, -7, 1, 0x7fffffff};
    std::vector<int32_t> lists(static_cast<size_t>(data->block_indices.bytes() / 4));
    std::vector<int32_t> lengths(static_cast<size_t>(data->lists()));
    for (size_t i = 0; i < lists.size(); ++i) lists[i] = entries[i % 8];
    for (size_t i = 0; i < lengths.size(); ++i) lengths[i] = counts[i % 4];
    data->block_indices.write(lists.data(), 0, data->block_indices.bytes());
    data->block_counts.write(lengths.data(), 0, data->block_counts.bytes());
}

void check_hostile(StageData* gpu, StageData* cpu, const std::string& where) {
    write_hostile_lists(gpu);
    write_hostile_lists(cpu);
    check_given(gpu, cpu, where);
    uint32_t word = 0;
    expect_ok(read_error_word(gpu->executor(), /*clear=*/true, &word), where + " read_error_word");
    expect(gpu->lists() == 0 || (word & kErrorBlockCount) != 0, where, "no count was flagged");

    const int64_t rows[] = {-1, int64_t{1} << 40, 0};
    int64_t num_rows = min_i64(3, gpu->shape().query_len);
    Buffer rows_gmem;
    rows_gmem.allocate(gpu->executor(), num_rows * 8);
    if (num_rows > 0) rows_gmem.write(rows, 0, num_rows * 8);
    expect_ok(gpu->run_omitted_mass_of(rows_gmem.as<int64_t>(), num_rows), where + " rows");
    expect_ok(read_error_word(gpu->executor(), /*clear=*/true, &word), where + " read_error_word");
}

// The call against the CPU's over the same lists, then lists that no caller should pass.
void check_lists(const Shape& shape, const Executor& cuda, const std::string& where) {
    StageData gpu(shape, cuda, /*seed=*/1), cpu(shape, Executor{}, /*seed=*/1);
    poison(&gpu);
    expect_ok(gpu.prepare(), where + " plan");
    expect_ok(gpu.run_call(), where + " call");
    if (gpu.plan().selection == Selection::kBlocks) {
        adopt_lists(gpu, &cpu);
        const auto given =
            shape.far_field ? &StageData::run_given_far : &StageData::run_given_lists;
        expect_ok(run_on_cpu(&cpu, given), where + " (CPU)");
    } else {
        expect_ok(run_on_cpu(&cpu, &StageData::prepare), where + " plan (CPU)");
        expect_ok(run_on_cpu(&cpu, &StageData::run_call), where + " (CPU)");
    }
    expect_same_attention(gpu, cpu, where + " call");
    check_rest(&gpu, where);
    check_hostile(&gpu, &cpu, where + " hostile");
}

void check_tokens(Shape shape, const Executor& cuda, const std::string& where) {
    shape.selector = Selector::kExact;
    shape.topk = 10;
    StageData gpu(shape, cuda, /*seed=*/1), cpu(shape, Executor{}, /*seed=*/1);
    poison(&gpu);
    expect_ok(gpu.prepare(), where + " plan");
    expect_ok(gpu.run_call(), where + " call");
    check_rest(&gpu, where);
    poison(&gpu);
    expect_ok(gpu.run_ranges(), where + " ranges");
    expect_ok(run_on_cpu(&cpu, &StageData::run_ranges), where + " ranges (CPU)");
    expect_same_attention(gpu, cpu, where + " ranges");
}

std::string describe(const char* path, const Case& c, const char* what) {
    return std::string(path[0] ? path : "planned") + " " + c.name + " " + what;
}

// bfloat16 takes every shape; the other dtypes the two fullest ones.
void check_path(const char* path, const Executor& cuda) {
    g_path = path;
    setenv(kForcePath, path, /*overwrite=*/1);
    const char* dtype_names[] = {"float16", "bfloat16", "float32"};
    for (DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
        int remaining = dtype == DType::kBFloat16 ? 1000 : 2;
        for (const Case& c : kCases) {
            if (remaining-- == 0) break;
            Shape shape = c.shape;
            shape.dtype = dtype;
            std::string where = describe(path, c, dtype_names[static_cast<int>(dtype)]);
            for (Selector selector : {Selector::kBlock, Selector::kQuest, Selector::kMean}) {
                shape.selector = selector;
                const std::string named = where + " " + selector_traits(selector).name;
                shape.far_field = shape.head_budgets = true;  // budgets of heads always select
                shape.top_p = 0.6f;
                check_lists(shape, cuda, named);
            }
            shape.selector = Selector::kBlock;
            shape.far_field = shape.head_budgets = false;
            shape.top_p = 0.0f;
            check_lists(shape, cuda, where + " block without far field");
            check_tokens(shape, cuda, where + " exact");
        }
    }
}

}  // namespace
}  // namespace condensate::bench

// Runs the paths named as arguments; "" is the planned one. Without arguments: planned and simt.
int main(int count, char** arguments) {
    namespace bench = condensate::bench;
    condensate::Executor cuda;
    cuda.cuda = condensate::built_with_cuda();  // a CPU-only build still checks this driver
    std::vector<const char*> paths(arguments + 1, arguments + count);
    if (paths.empty())
        paths = cuda.cuda ? std::vector<const char*>{"", "simt"} : std::vector<const char*>{""};
    for (const char* path : paths) bench::check_path(path, cuda);
    std::printf("gpu_check: %d passed, %d failed\n", bench::g_checks - bench::g_failures,
                bench::g_failures);
    return bench::g_failures == 0 ? 0 : 1;
}
