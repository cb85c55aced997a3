// The kernels of decoding, emulated, against the reference: memory as it must be used, lists and
// outputs as docs/decoding.md defines them, the same bits in whatever order threads run.
#include <cuda_fp8.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

#include <gtest/gtest.h>

#include "emulate.h"
#include "host/number.h"
#include "kernels/launchers.h"
#include "reference/reference.h"

namespace condensate {
namespace {

void put(DType dtype, void* data, int64_t index, float x) {
    if (dtype == DType::kFloat8E4M3)
        static_cast<__nv_fp8_e4m3*>(data)[index] = __nv_fp8_e4m3(x);
    else
        store_number(dtype, data, index, x);
}

// Bytes that kernels may touch, at an address of their own, with a margin around that they may not.
struct Memory {
    std::vector<char> bytes;
    const char* name;
    Memory(const char* what, int64_t count, bool read_only)
        : bytes(static_cast<size_t>(count) + 256), name(what) {
        fill(0);
        emulate::add_memory(data(), size(), name, read_only);
    }
    ~Memory() { emulate::remove_memory(data()); }
    Memory(const Memory&) = delete;
    char* data() {
        return bytes.data() + (128 - reinterpret_cast<uintptr_t>(bytes.data()) % 128) % 128;
    }
    size_t size() const { return bytes.size() - 256; }
    template <class T>
    T* as() {
        return reinterpret_cast<T*>(data());
    }
    void fill(int byte) { std::memset(data(), byte, size()); }
};

struct Case {
    const char* name;
    DType dtype = DType::kBFloat16;
    DType cache = DType::kBFloat16;
    int head_dim = 64, group = 2, kv_heads = 2, query_len = 1;
    int page_size = 16;  // 0: contiguous
    int capacity = 1024;
    std::vector<int> lengths = {700, 0, 1, 3, 1024, 97, 400};
    int window = 64, anchors = 16, topk = 64, shortlist = 256;
    float top_p = 0, softcap = 0;
    bool sinks = false, far_field = true, integers = true, hostile = false, centered = false;
    int sm_major = 8;
};

class World {
  public:
    explicit World(const Case& the_case, uint32_t seed)
        : c(the_case),
          random(seed),
          batch(static_cast<int64_t>(c.lengths.size())),
          page_size(c.page_size ? c.page_size : c.capacity),
          columns(c.capacity / page_size),
          pages(c.page_size ? batch * columns + 3 : batch),
          element(dtype_bytes(c.cache)),
          records(record_rows(page_size, c.page_size > 0)),
          rows(batch * c.kv_heads * c.group * c.query_len),
          lists(batch * c.kv_heads * c.query_len),
          key("key", pages * c.kv_heads * page_size * c.head_dim * element, true),
          value("value", pages * c.kv_heads * page_size * c.head_dim * element, true),
          table("block_table", 4 * batch * columns, true),
          lengths("lengths", 4 * batch, true),
          key_scale("key_scale", 4 * c.kv_heads, true),
          value_scale("value_scale", 4 * c.kv_heads, true),
          center("key_center", 4 * c.kv_heads * c.head_dim, true),
          query("query", rows * c.head_dim * 2, true),
          sinks("sinks", 4 * c.kv_heads * c.group, true),
          summary_rows("summaries", pages * c.kv_heads * records * c.head_dim, false),
          summary_scales("scales", 4 * pages * c.kv_heads * records, false),
          out("out", rows * c.head_dim * 2, false),
          lse("lse", 4 * rows, false),
          omitted("omitted", 4 * rows, false),
          tokens("tokens", 4 * lists * std::max(c.topk, 1), false),
          counts("counts", 4 * lists, false),
          error_word("error_word", 4, false) {
        fill();
        update();
    }

    float draw() {
        if (c.integers) return static_cast<float>(static_cast<int>(random() % 5) - 2);
        return std::normal_distribution<float>()(random);
    }
    void fill() {
        std::vector<int32_t> order(static_cast<size_t>(pages));
        for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
        if (c.page_size) std::shuffle(order.begin(), order.end(), random);
        const float nan = std::nanf("");
        for (int64_t i = 0; i < pages * c.kv_heads * page_size * c.head_dim; ++i) {
            put(c.cache, key.data(), i, nan);
            put(c.cache, value.data(), i, nan);
        }
        const int32_t garbage[] = {-1, INT32_MIN, INT32_MAX, 1 << 20};
        for (int64_t b = 0; b < batch; ++b) {
            lengths.as<int32_t>()[b] = c.lengths[static_cast<size_t>(b)];
            const int64_t n = std::clamp(c.lengths[static_cast<size_t>(b)], 0, c.capacity);
            for (int64_t i = 0; i < columns; ++i)
                table.as<int32_t>()[b * columns + i] =
                    i * page_size < n ? order[static_cast<size_t>(b * columns + i)]
                                      : garbage[random() % 4];
            for (int64_t j = 0; j < n; ++j) {
                const int64_t page =
                    c.page_size ? table.as<int32_t>()[b * columns + j / page_size] : b;
                for (int64_t h = 0; h < c.kv_heads; ++h)
                    for (int64_t d = 0; d < c.head_dim; ++d) {
                        const int64_t at =
                            ((page * c.kv_heads + h) * page_size + j % page_size) * c.head_dim + d;
                        put(c.cache, key.data(), at, draw());
                        put(c.cache, value.data(), at, draw());
                    }
            }
        }
        for (int64_t i = 0; i < rows * c.head_dim; ++i) put(c.dtype, query.data(), i, draw());
        for (int64_t h = 0; h < c.kv_heads * c.group; ++h) sinks.as<float>()[h] = draw();
        for (int64_t h = 0; h < c.kv_heads; ++h) {
            key_scale.as<float>()[h] = 0.5f;
            value_scale.as<float>()[h] = 2.0f;
        }
        for (int64_t i = 0; i < c.kv_heads * c.head_dim; ++i) center.as<float>()[i] = draw();
    }
    DecodeParams params(DecodeMode mode) {
        DecodeParams p;
        p.mode = mode;
        p.dtype = c.dtype;
        p.batch = batch;
        p.query_heads = c.kv_heads * c.group;
        p.kv_heads = c.kv_heads;
        p.query_len = c.query_len;
        p.head_dim = c.head_dim;
        p.window = c.window;
        p.anchors = c.anchors;
        p.topk = c.topk;
        p.shortlist = c.shortlist;
        p.top_p = c.top_p;
        p.softcap = c.softcap;
        p.scale = c.integers ? 1.0f / 32 : 1.0f / std::sqrt(static_cast<float>(c.head_dim));
        p.far_field = c.far_field;
        const int64_t per_head = int64_t{c.query_len} * c.head_dim;
        p.query = {query.data(), p.query_heads * per_head, per_head, c.head_dim};
        KvCache& k = p.cache;
        k.dtype = c.cache;
        k.key = key.data();
        k.value = value.data();
        k.key_stride_token = k.value_stride_token = c.head_dim;
        k.key_stride_head = k.value_stride_head = page_size * c.head_dim;
        k.key_stride_page = k.value_stride_page = c.kv_heads * page_size * c.head_dim;
        k.num_pages = pages;
        k.page_size = page_size;
        k.max_pages = columns;
        k.block_table = c.page_size ? table.as<int32_t>() : nullptr;
        k.lengths = lengths.as<int32_t>();
        if (c.cache == DType::kFloat8E4M3) {
            k.key_scale = key_scale.as<float>();
            k.value_scale = value_scale.as<float>();
        }
        KvSummaries& s = p.summaries;
        s.rows = summary_rows.as<int8_t>();
        s.scales = summary_scales.as<float>();
        s.rows_stride_head = records * c.head_dim;
        s.rows_stride_page = c.kv_heads * records * c.head_dim;
        s.scales_stride_head = records;
        s.scales_stride_page = c.kv_heads * records;
        s.key_center = c.centered ? center.as<float>() : nullptr;
        if (mode == DecodeMode::kSelect || mode == DecodeMode::kGivenTokens) {
            p.token_indices = tokens.as<int32_t>();
            p.token_counts = counts.as<int32_t>();
        }
        if (mode == DecodeMode::kSelect) return p;
        p.sinks = c.sinks ? sinks.as<float>() : nullptr;
        p.out = out.data();
        p.out_stride_batch = p.query.stride_batch;
        p.out_stride_head = p.query.stride_head;
        p.out_stride_seq = p.query.stride_seq;
        p.lse = lse.as<float>();
        p.omitted_mass_estimate = omitted.as<float>();
        return p;
    }
    kernels::LaunchContext context() {
        kernels::LaunchContext context;
        context.sm_count = 4;
        context.sm_major = c.sm_major;
        context.max_smem_per_block_bytes = 227 * 1024;
        context.error_word = error_word.as<uint32_t>();
        return context;
    }
    void update() {
        UpdateSummariesParams u;
        const DecodeParams p = params(DecodeMode::kSelect);
        u.batch = batch;
        u.kv_heads = c.kv_heads;
        u.head_dim = c.head_dim;
        u.appended = c.capacity;
        u.cache = p.cache;
        u.summaries = p.summaries;
        summary_rows.fill(0x55);
        summary_scales.fill(0x55);
        uint32_t errors = 0;
        reference::update_kv_summaries(u, &errors);
        const std::vector<char> expected = summary_rows.bytes, scales = summary_scales.bytes;
        summary_rows.fill(0x55);
        summary_scales.fill(0x55);
        ASSERT_TRUE(kernels::update_summaries(u, context()).ok());
        EXPECT_EQ(summary_rows.bytes, expected);
        EXPECT_EQ(summary_scales.bytes, scales);
        EXPECT_EQ(take_errors(), errors);
    }
    uint32_t take_errors() {
        const uint32_t word = *error_word.as<uint32_t>();
        *error_word.as<uint32_t>() = 0;
        return word;
    }
    std::vector<std::vector<char>> results() {
        return {out.bytes, lse.bytes, omitted.bytes, tokens.bytes, counts.bytes};
    }
    // All results of a call, with whatever was in the workspace before.
    std::vector<std::vector<char>> run(DecodeMode mode, uint32_t order, int garbage) {
        DecodeParams p = params(mode);
        Memory workspace("workspace", std::max<int64_t>(kernels::decode_workspace_bytes(p), 1),
                         false);
        workspace.fill(garbage);
        emulate::set_garbage(garbage);
        p.workspace = workspace.data();
        if (mode != DecodeMode::kSelect) {
            out.fill(0xff);
            lse.fill(0xff);
            omitted.fill(0xff);
        } else {
            tokens.fill(0xee);
            counts.fill(0xee);
        }
        emulate::set_order(order);
        const Status status = kernels::decode_attention(p, context());
        EXPECT_TRUE(status.ok()) << status.message;
        return results();
    }
    void run_reference(DecodeMode mode, uint32_t* errors) {
        reference::attention_with_kvcache(params(mode), errors);
    }

    const Case& c;
    std::mt19937 random;
    int64_t batch, page_size, columns, pages, element, records, rows, lists;
    Memory key, value, table, lengths, key_scale, value_scale, center, query, sinks;
    Memory summary_rows, summary_scales, out, lse, omitted, tokens, counts, error_word;
};

void expect_close(World& w, const std::vector<std::vector<char>>& got,
                  const std::vector<std::vector<char>>& want) {
    auto start = [](Memory& m) { return m.data() - m.bytes.data(); };
    double worst = 0, worst_lse = 0, worst_omitted = 0;
    for (int64_t i = 0; i < w.rows; ++i) {
        const auto* got_lse = reinterpret_cast<const float*>(got[1].data() + start(w.lse));
        const auto* want_lse = reinterpret_cast<const float*>(want[1].data() + start(w.lse));
        if (got_lse[i] != want_lse[i])
            worst_lse = std::fmax(
                worst_lse, std::isnan(got_lse[i]) ? INFINITY : std::fabs(got_lse[i] - want_lse[i]));
        const auto* got_om = reinterpret_cast<const float*>(got[2].data() + start(w.omitted));
        const auto* want_om = reinterpret_cast<const float*>(want[2].data() + start(w.omitted));
        const double d = std::fabs(double{got_om[i]} - want_om[i]);
        worst_omitted = std::fmax(worst_omitted, std::isnan(d) ? INFINITY : d);
    }
    for (int64_t i = 0; i < w.rows * w.c.head_dim; ++i) {
        const double a = load_number(w.c.dtype, got[0].data() + start(w.out), i);
        const double b = load_number(w.c.dtype, want[0].data() + start(w.out), i);
        const double d = std::fabs(a - b);
        worst = std::fmax(worst, std::isnan(d) ? INFINITY : d);
    }
    EXPECT_LT(worst, w.c.dtype == DType::kFloat16 ? 0.01 : 0.06) << w.c.name;
    EXPECT_LT(worst_lse, 1e-4) << w.c.name;
    EXPECT_LT(worst_omitted, 1e-4) << w.c.name;
}

void check(const Case& c, uint32_t seed = 1) {
    SCOPED_TRACE(c.name);
    World w(c, seed);
    for (const std::string& line : emulate::take_reports()) ADD_FAILURE() << "update: " << line;
    for (const DecodeMode mode :
         {DecodeMode::kSelect, DecodeMode::kSelectAndAttend, DecodeMode::kGivenTokens}) {
        SCOPED_TRACE(static_cast<int>(mode));
        const auto first = w.run(mode, 1, 0xff);
        const uint32_t errors = w.take_errors();
        const auto second = w.run(mode, 2, 0x7f);
        w.take_errors();
        EXPECT_EQ(first, second) << "not the same bits again";
        for (const std::string& line : emulate::take_reports()) ADD_FAILURE() << line;
        uint32_t expected_errors = 0;
        w.run_reference(mode, &expected_errors);
        EXPECT_EQ(errors, expected_errors);
        const auto expected = w.results();
        if (mode == DecodeMode::kSelect) {
            EXPECT_EQ(first[4], expected[4]) << "counts";
            if (c.integers) {
                EXPECT_EQ(first[3], expected[3]) << "lists";
            }
        } else {
            expect_close(w, first, expected);
        }
    }
}

constexpr DType kF16 = DType::kFloat16, kBF16 = DType::kBFloat16, kF8 = DType::kFloat8E4M3;

Case with(const char* name, void (*change)(Case&)) {
    Case c;
    c.name = name;
    change(c);
    return c;
}

class Decode : public testing::TestWithParam<Case> {};

TEST_P(Decode, MatchesTheReference) { check(GetParam()); }

const Case kCases[] = {
    with("Plain", [](Case&) {}),
    with("Contiguous",
         [](Case& c) {
             c.page_size = 0;
             c.query_len = 3;
         }),
    with("RealNumbers",
         [](Case& c) {
             c.integers = false;
             c.page_size = 64;
             c.query_len = 2;
         }),
    with("PagesOf128",
         [](Case& c) {
             c.page_size = 128;
             c.dtype = c.cache = kF16;
         }),
    with("EightBits",
         [](Case& c) {
             c.cache = kF8;
             c.sinks = true;
         }),
    with("EightBitsHalf",
         [](Case& c) {
             c.dtype = kF16;
             c.cache = kF8;
             c.head_dim = 96;
             c.query_len = 2;
         }),
    with("SixteenQueries",
         [](Case& c) {
             c.query_len = 16;
             c.kv_heads = 1;
             c.lengths = {700, 9, 1024};
         }),
    with("GroupOf16",
         [](Case& c) {
             c.group = 16;
             c.kv_heads = 1;
             c.head_dim = 128;
             c.query_len = 5;
             c.lengths = {700, 1023};
         }),
    with("GroupOf7",
         [](Case& c) {
             c.group = 7;
             c.head_dim = 96;
             c.lengths = {700, 1023};
         }),
    with("GroupOf1",
         [](Case& c) {
             c.group = 1;
             c.head_dim = 256;
             c.lengths = {700, 1023};
         }),
    with("GroupOf4",
         [](Case& c) {
             c.group = 4;
             c.head_dim = 128;
             c.lengths = {700, 1023};
         }),
    with("TopP",
         [](Case& c) {
             c.top_p = 0.5f;
             c.topk = 256;
         }),
    with("TopPReal",
         [](Case& c) {
             c.top_p = 0.9f;
             c.integers = false;
         }),
    with("Softcap",
         [](Case& c) {
             c.softcap = 30;
             c.sinks = true;
             c.far_field = false;
         }),
    with("NoWindow",
         [](Case& c) {
             c.window = 0;
             c.anchors = 0;
         }),
    with("CutWindow",
         [](Case& c) {
             c.window = 65;
             c.anchors = 63;
             c.lengths = {640, 641, 703, 704};
         }),
    with("WideRanges",
         [](Case& c) {
             c.window = 200;
             c.anchors = 101;
             c.lengths = {640, 641, 703, 704};
         }),
    with("NoTokens",
         [](Case& c) {
             c.topk = 0;
             c.shortlist = 64;
         }),
    with("NoShortlist",
         [](Case& c) {
             c.topk = 0;
             c.shortlist = 0;
         }),
    with("OneToken",
         [](Case& c) {
             c.topk = 1;
             c.shortlist = 8;
         }),
    with("Centered", [](Case& c) { c.centered = true; }),
    with("LongWithTies",
         [](Case& c) {
             c.capacity = 4096;
             c.lengths = {4096, 3000};
             c.shortlist = 2048;
             c.topk = 1024;
             c.page_size = 64;
         }),
    with("Cluster",
         [](Case& c) {
             c.capacity = 81920;
             c.lengths = {81920, 70001};
             c.kv_heads = 1;
             c.page_size = 64;
             c.shortlist = 1024;
             c.sm_major = 9;
             c.integers = false;
         }),
};

INSTANTIATE_TEST_SUITE_P(Kernels, Decode, testing::ValuesIn(kCases),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace condensate
