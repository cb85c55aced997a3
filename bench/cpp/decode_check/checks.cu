// Dense decoding and the update of summaries against the host: float64, equal bits, hostile tables.
#include "world.h"

namespace condensate::bench {
namespace {

// Largest error of outputs in units of the tolerance, and of LSE absolutely.
void compare(World& w, double* worst, double* worst_lse) {
    const Case& c = w.c;
    const int group = c.heads / c.kv_heads;
    const double u = c.dtype == kF16 ? 1.0 / 2048 : 1.0 / 256;
    for (int64_t b = 0; b < w.batch; ++b)
        for (int h = 0; h < c.heads; ++h)
            for (int i = 0; i < c.query_len; ++i) {
                const int64_t row = (b * c.heads + h) * c.query_len + i;
                const int64_t p = w.bounded(b) - c.query_len + i;
                const int kv = h / group;
                const double ks = c.cache == kF8 ? w.key_scale.as<float>()[kv] : 1.0;
                const double vs = c.cache == kF8 ? w.value_scale.as<float>()[kv] : 1.0;
                std::vector<double> scores;
                std::vector<int64_t> at;
                double most = -INFINITY, total = 0.0;
                for (int64_t j = 0; j <= p; ++j) {
                    const int64_t page =
                        c.page ? w.table.as<int32_t>()[b * w.max_pages + j / w.page_size] : b;
                    if (page < 0 || page >= w.pages) continue;
                    const int64_t o = w.offset(page, kv, j % w.page_size);
                    double s = 0.0;
                    for (int d = 0; d < c.dim; ++d)
                        s += double{get(c.dtype, w.query.as<char>(), row * c.dim + d)} *
                             get(c.cache, w.key.as<char>(), o + d);
                    s *= w.params.scale * ks;
                    if (c.softcap > 0) s = c.softcap * std::tanh(s / c.softcap);
                    scores.push_back(s);
                    at.push_back(o);
                    most = std::max(most, s);
                }
                if (c.sinks && p >= 0) most = std::max(most, double{w.sinks.as<float>()[h]});
                for (double s : scores) total += std::exp(s - most);
                if (c.sinks && p >= 0) total += std::exp(w.sinks.as<float>()[h] - most);
                for (int d = 0; d < c.dim; ++d) {
                    double o = 0.0, a = 0.0;
                    for (size_t n = 0; n < at.size(); ++n) {
                        const double v = get(c.cache, w.value.as<char>(), at[n] + d) * vs;
                        o += std::exp(scores[n] - most) / total * v;
                        a += std::exp(scores[n] - most) / total * std::fabs(v);
                    }
                    const double got = get(c.dtype, w.out.as<char>(), row * c.dim + d);
                    const double error =
                        std::fabs(got - o) / (u * (a + std::fabs(o)) + 2e-5 * a + 1e-30);
                    *worst = std::max(*worst, std::isnan(got) ? INFINITY : error);
                }
                const double lse = total > 0 ? most + std::log(total) : -INFINITY;
                const double got = w.lse.as<float>()[row];
                const double d = lse == got ? 0.0 : std::fabs(lse - got);
                *worst_lse = std::max(*worst_lse, std::isnan(got) ? INFINITY : d);
            }
}

int g_failures = 0;

void run_case(const Case& c, const kernels::LaunchContext& context) {
    World w(c);
    CHECK(cudaMemset(w.out.device, 0xff, w.out.host.size()));
    CHECK(cudaMemset(w.workspace.device, 0xff, w.workspace.host.size()));
    bool ok = expect_ok(kernels::decode::run_dense(w.params, context));
    const uint32_t errors = take_errors(context);
    w.out.down();
    w.lse.down();
    double worst = 0.0, worst_lse = 0.0;
    compare(w, &worst, &worst_lse);
    // Every sequence alone: the same bits.
    const std::vector<char> out = w.out.host, lse = w.lse.host;
    for (int64_t b = 0; b < w.batch; ++b)
        ok &= expect_ok(kernels::decode::run_dense(w.make(b, 1), context));
    take_errors(context);
    w.out.down();
    w.lse.down();
    const bool same = out == w.out.host && lse == w.lse.host;
    const uint32_t expected = c.hostile ? kErrorBlockTable | kErrorCacheLength : 0u;
    ok &= worst <= 1.0 && worst_lse <= 2e-4 && same && errors == expected;
    g_failures += !ok;
    std::printf("%-34s error/tolerance %.3f  lse %.1e  alone %s  errors %u  %s\n", c.name, worst,
                worst_lse, same ? "same" : "DIFFERS", errors, ok ? "ok" : "FAILED");
}

// The summaries against the same float32 operations on the host: equal bits.
void run_update(const Case& c, int64_t appended, const kernels::LaunchContext& context) {
    World w(c);
    const int64_t rows = record_rows(w.page_size, c.page > 0), units = unit_rows(w.page_size);
    const int pool = pool_keys(w.page_size, c.page > 0);
    Buffer entries(w.pages * c.kv_heads * rows * c.dim), scales(4 * w.pages * c.kv_heads * rows),
        center(4 * c.kv_heads * c.dim);
    for (int64_t i = 0; i < c.kv_heads * c.dim; ++i) center.as<float>()[i] = 0.3f * normal();
    std::fill(entries.host.begin(), entries.host.end(), char{77});
    std::fill(scales.as<float>(), scales.as<float>() + w.pages * c.kv_heads * rows, 5.0f);
    center.up();
    entries.up();
    scales.up();
    UpdateSummariesParams p;
    p.batch = w.batch;
    p.kv_heads = c.kv_heads;
    p.head_dim = c.dim;
    p.appended = appended;
    p.cache = w.params.cache;
    p.summaries.rows = reinterpret_cast<int8_t*>(entries.device);
    p.summaries.scales = reinterpret_cast<float*>(scales.device);
    p.summaries.rows_stride_head = rows * c.dim;
    p.summaries.rows_stride_page = c.kv_heads * rows * c.dim;
    p.summaries.scales_stride_head = rows;
    p.summaries.scales_stride_page = c.kv_heads * rows;
    p.summaries.key_center = reinterpret_cast<float*>(center.device);
    bool ok = expect_ok(kernels::update_summaries(p, context));
    const uint32_t errors = take_errors(context);

    auto make_row = [&](bool values, int64_t page, int64_t head, int64_t begin, int64_t end,
                        int64_t row) {
        const float s =
            c.cache != kF8 ? 1.0f : (values ? w.value_scale : w.key_scale).as<float>()[head];
        std::vector<float> x(c.dim);
        float m = 0.0f;
        volatile float t;
        for (int d = 0; d < c.dim; ++d) {
            volatile float sum = 0.0f, part = 0.0f;
            for (int64_t slot = begin; slot < end; ++slot) {
                part = part + get(c.cache, (values ? w.value : w.key).as<char>(),
                                  w.offset(page, head, slot) + d);
                if ((slot + 1) % kUnitKeys != 0 && slot + 1 < end) continue;
                sum = sum + part;
                part = 0.0f;
            }
            t = sum / static_cast<float>(end - begin);
            t = t * s;
            if (!values) t = t - center.as<float>()[head * c.dim + d];
            x[d] = t;
            m = std::max<float>(m, std::fabs(x[d]));
        }
        const int64_t flat = (page * c.kv_heads + head) * rows + row;
        volatile float inverse = 127.0f / m;
        for (int d = 0; d < c.dim; ++d) {
            t = x[d] * inverse;
            entries.as<int8_t>()[flat * c.dim + d] = static_cast<int8_t>(std::nearbyint(t));
        }
        scales.as<float>()[flat] = m / 127.0f;
    };
    for (int64_t b = 0; b < w.batch; ++b) {
        const int64_t n = w.bounded(b), from = std::max<int64_t>(n - appended, 0);
        for (int64_t j = from; j < n; ++j) {
            const int64_t page =
                c.page ? w.table.as<int32_t>()[b * w.max_pages + j / w.page_size] : b;
            if (page < 0 || page >= w.pages) continue;
            const int64_t slot = j % w.page_size, left = n - j + slot,
                          in_page = std::min(left, w.page_size);
            const int64_t unit = slot / kUnitKeys, pl = slot / pool;
            for (int64_t h = 0; h < c.kv_heads; ++h) {
                if (j == from || slot % kUnitKeys == 0)
                    make_row(false, page, h, unit * kUnitKeys,
                             std::min<int64_t>(in_page, unit * kUnitKeys + kUnitKeys), unit);
                if (j == from || slot % pool == 0)
                    make_row(true, page, h, pl * pool, std::min<int64_t>(in_page, pl * pool + pool),
                             units + pl);
            }
        }
    }
    const std::vector<char> want = entries.host, want_scales = scales.host;
    entries.down();
    scales.down();
    const bool same = want == entries.host && want_scales == scales.host;
    const uint32_t expected = c.hostile ? kErrorCacheLength : 0u;
    ok &= same && (errors & ~kErrorBlockTable) == expected;
    g_failures += !ok;
    std::printf("update %5lld of %-24s bits %s  errors %u  %s\n", static_cast<long long>(appended),
                c.name, same ? "equal" : "DIFFER", errors, ok ? "ok" : "FAILED");
}

// More sequences than a warp has lanes and more work items than CTAs.
std::vector<int> many_lengths() {
    std::vector<int> lengths;
    for (int b = 0; b < 70; ++b) lengths.push_back(b % 7 == 3 ? 0 : b * 37 % 401);
    return lengths;
}

const Case kCases[] = {
    {"bf16 d128 contiguous", kBF16, kBF16, 128, 8, 2, 1, 0, false, {1, 17, 300, 0, 1000}},
    {"bf16 d128 pages of 16 NHD", kBF16, kBF16, 128, 8, 2, 3, 16, true, {2, 700, 33, 129, 5}},
    {"f16 d64 pages of 64", kF16, kF16, 64, 4, 4, 1, 64, false, {64, 65, 63, 900}},
    {"bf16 d96 pages of 32", kBF16, kBF16, 96, 6, 2, 5, 32, false, {1, 31, 500, 257}},
    {"f16 d256 pages of 128", kF16, kF16, 256, 4, 2, 2, 128, true, {300, 128, 1}},
    {"bf16 d256 group 16, 16 queries", kBF16, kBF16, 256, 16, 1, 16, 16, false, {400, 7}},
    {"bf16 d128 8 queries", kBF16, kBF16, 128, 32, 8, 8, 16, false, {4, 300, 17, 1500}},
    {"bf16 d128 group 16, 16 queries", kBF16, kBF16, 128, 32, 2, 16, 32, false, {9, 450}},
    {"f16 long: splits of more", kF16, kF16, 64, 2, 1, 1, 64, false, {20000, 16385}},
    {"e4m3 d128, bf16 queries", kBF16, kF8, 128, 8, 2, 1, 16, false, {1, 300, 1000}},
    {"e4m3 d128, f16, 8 queries", kF16, kF8, 128, 16, 4, 8, 64, true, {40, 300}},
    {"e4m3 d64", kBF16, kF8, 64, 8, 2, 2, 16, false, {1, 500}},
    {"e4m3 d96", kF16, kF8, 96, 8, 2, 6, 32, false, {3, 500}},
    {"e4m3 d256", kBF16, kF8, 256, 8, 2, 2, 16, true, {50, 260}},
    {"70 sequences", kBF16, kBF16, 64, 16, 8, 2, 16, false, many_lengths()},
    {"softcap and sinks", kBF16, kBF16, 128, 8, 2, 2, 16, false, {1, 200, 900}, 5.0f, true},
    {"negative scale", kF16, kF16, 64, 8, 2, 2, 16, false, {1, 200}, 0.0f, false, false, -1.0f},
    {"hostile",
     kBF16,
     kBF16,
     128,
     8,
     2,
     2,
     16,
     false,
     {200, 200, 200, 200, 200, 200, 200},
     0.0f,
     false,
     true},
};

}  // namespace

int check_all(const kernels::LaunchContext& context) {
    g_failures = 0;
    for (const Case& c : kCases) run_case(c, context);
    for (int64_t appended : {1, 9, 100, 100000})
        for (int i : {0, 1, 2, 3, 4, 9, 12, 13, 14, 17})
            if (!kCases[i].hostile || appended > 100) run_update(kCases[i], appended, context);
    std::printf("%d failures\n", g_failures);
    return g_failures;
}

}  // namespace condensate::bench
