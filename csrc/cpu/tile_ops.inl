// The tile operations over vectors of kLanes floats (GCC vector extension). Included once per
// instruction set, inside that set's namespace and target pragma, after kLanes is defined. Calls no
// function from elsewhere: an inline function compiled for a wide instruction set here could be the
// copy that the linker keeps for machines without it.

using Vec = float __attribute__((vector_size(4 * kLanes)));
using IntVec = int32_t __attribute__((vector_size(4 * kLanes)));
using UintVec = uint32_t __attribute__((vector_size(4 * kLanes)));
using HalfVec = uint16_t __attribute__((vector_size(2 * kLanes)));
using ByteVec = uint8_t __attribute__((vector_size(kLanes)));
using Int8Vec = int8_t __attribute__((vector_size(kLanes)));

constexpr int kPanelVecs = kPanelRows / kLanes;
constexpr float kInf = __builtin_inff();

#define CONDENSATE_INLINE static inline __attribute__((always_inline))

template <class V, class T>
CONDENSATE_INLINE V load(const T* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
}
template <class V, class T>
CONDENSATE_INLINE void store(T* p, V v) {
    __builtin_memcpy(p, &v, sizeof(v));
}
CONDENSATE_INLINE Vec splat(float x) { return Vec{} + x; }
CONDENSATE_INLINE IntVec splat(int32_t x) { return IntVec{} + x; }
CONDENSATE_INLINE Vec vmax(Vec a, Vec b) { return b > a ? b : a; }  // keeps a where b is NaN

// exp of x <= 0 (and up to 88), NaN for NaN; below -87 it is 0. Within 2 units in the last place:
// x = n ln 2 + r, a degree-6 polynomial in r (Cephes' coefficients), 2^n by its exponent bits.
CONDENSATE_INLINE Vec exp_nonpositive(Vec x) {
    const Vec shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    Vec shifted = x * 1.44269504088896341f + shifter;
    Vec n = shifted - shifter;
    Vec r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    Vec y = splat(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    UintVec bits;
    __builtin_memcpy(&bits, &shifted, sizeof(bits));
    bits = (bits << 23) + (127u << 23);
    y = y * load<Vec>(&bits);
    return x < -87.0f ? splat(0.0f) : y;
}

// ---- Loading ----

CONDENSATE_INLINE Vec widen_bfloat16(HalfVec half) {
    UintVec bits = __builtin_convertvector(half, UintVec) << 16;
    return load<Vec>(&bits);
}

CONDENSATE_INLINE Vec widen_float16(HalfVec half) {
    UintVec wide = __builtin_convertvector(half, UintVec);
    UintVec sign = (wide & 0x8000u) << 16, magnitude = (wide & 0x7fffu) << 13;
    UintVec normal = magnitude + (112u << 23);  // moves the exponent bias from 15 to 127
    UintVec special = magnitude | 0x7f800000u;
    UintVec subnormal_bits = magnitude + (113u << 23), unit_bits = UintVec{} + (113u << 23);
    Vec subnormal = load<Vec>(&subnormal_bits) - load<Vec>(&unit_bits);
    UintVec bits = magnitude >= (0x7c00u << 13) ? special : normal;
    bits = magnitude < (0x0400u << 13) ? load<UintVec>(&subnormal) : bits;
    bits |= sign;
    return load<Vec>(&bits);
}

CONDENSATE_INLINE Vec widen_e4m3(ByteVec byte) {
    UintVec wide = __builtin_convertvector(byte, UintVec);
    UintVec sign = (wide & 0x80u) << 24, magnitude = (wide & 0x7fu) << 20;
    UintVec normal = magnitude + (120u << 23);  // moves the exponent bias from 7 to 127
    UintVec subnormal_bits = magnitude + (121u << 23), unit_bits = UintVec{} + (121u << 23);
    Vec subnormal = load<Vec>(&subnormal_bits) - load<Vec>(&unit_bits);
    UintVec bits = magnitude == (0x7fu << 20) ? UintVec{} + 0x7fc00000u : normal;
    bits = magnitude < (0x08u << 20) ? load<UintVec>(&subnormal) : bits;
    bits |= sign;
    return load<Vec>(&bits);
}

template <DType kType>
CONDENSATE_INLINE Vec load_numbers(const void* source, int64_t at, int count) {
    if constexpr (kType == DType::kFloat32) {
        const float* p = static_cast<const float*>(source) + at;
        if (count >= kLanes) return load<Vec>(p);
        float part[kLanes] = {};
        __builtin_memcpy(part, p, static_cast<size_t>(count) * sizeof(float));
        return load<Vec>(part);
    } else if constexpr (kType == DType::kFloat8E4M3) {
        const uint8_t* p = static_cast<const uint8_t*>(source) + at;
        uint8_t part[kLanes] = {};
        if (count < kLanes) {
            __builtin_memcpy(part, p, static_cast<size_t>(count));
            p = part;
        }
        return widen_e4m3(load<ByteVec>(p));
    } else {
        const uint16_t* p = static_cast<const uint16_t*>(source) + at;
        uint16_t part[kLanes] = {};
        if (count < kLanes) {
            __builtin_memcpy(part, p, static_cast<size_t>(count) * sizeof(uint16_t));
            p = part;
        }
        HalfVec half = load<HalfVec>(p);
        return kType == DType::kFloat16 ? widen_float16(half) : widen_bfloat16(half);
    }
}

template <DType kType>
CONDENSATE_INLINE bool load_rows_of(const void* source, int64_t stride, int rows, int dim,
                                    float* target, int ld) {
    Vec probe = splat(0.0f);  // stays 0 unless a number is not finite
    for (int row = 0; row < rows; ++row) {
        int64_t at = row * stride;
        int d = 0;
        for (; d + kLanes <= dim; d += kLanes) {
            Vec x = load_numbers<kType>(source, at + d, kLanes);
            probe += x * 0.0f;
            store(target + d, x);
        }
        if (d < dim) {
            Vec x = load_numbers<kType>(source, at + d, dim - d);
            probe += x * 0.0f;
            __builtin_memcpy(target + d, &x, static_cast<size_t>(dim - d) * sizeof(float));
            d = dim;
        }
        for (; d < ld; ++d) target[d] = 0.0f;
        target += ld;
    }
    bool finite = true;
    for (int lane = 0; lane < kLanes; ++lane) finite = finite && probe[lane] == 0.0f;
    return finite;
}

static bool load_rows(DType dtype, const void* source, int64_t stride, int rows, int dim,
                      float* target, int ld) {
    if (dtype == DType::kFloat16)
        return load_rows_of<DType::kFloat16>(source, stride, rows, dim, target, ld);
    if (dtype == DType::kBFloat16)
        return load_rows_of<DType::kBFloat16>(source, stride, rows, dim, target, ld);
    if (dtype == DType::kFloat8E4M3)
        return load_rows_of<DType::kFloat8E4M3>(source, stride, rows, dim, target, ld);
    return load_rows_of<DType::kFloat32>(source, stride, rows, dim, target, ld);
}

static void load_int8_rows(const int8_t* source, int64_t stride, int rows, int dim, float* target,
                           int ld) {
    for (int row = 0; row < rows; ++row, source += stride, target += ld) {
        int d = 0;
        for (; d + kLanes <= dim; d += kLanes)
            store(target + d, __builtin_convertvector(load<Int8Vec>(source + d), Vec));
        for (; d < dim; ++d) target[d] = static_cast<float>(source[d]);
        for (; d < ld; ++d) target[d] = 0.0f;
    }
}

// ---- Scores ----

// Keys x vectors of rows that stay in registers: enough chains to hide the latency of a
// multiply-add, few enough for the register file.
constexpr int kScoreKeys = kLanes == 16 ? 8 : kLanes == 8 ? 4 : 2;

template <int kPanels>
CONDENSATE_INLINE void score_keys(const float* queries, const float* keys, int ld, int dim,
                                  float scale, float* scores) {
    constexpr int kVecs = kPanels * kPanelVecs;
    Vec sum[kScoreKeys][kVecs];
#pragma GCC unroll 8
    for (int key = 0; key < kScoreKeys; ++key)
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) sum[key][v] = splat(0.0f);
    const int panel_stride = dim * kPanelRows;
    for (int d = 0; d < dim; ++d) {
        Vec query[kVecs];
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v)
            query[v] = load<Vec>(queries + (v / kPanelVecs) * panel_stride + d * kPanelRows +
                                 (v % kPanelVecs) * kLanes);
#pragma GCC unroll 8
        for (int key = 0; key < kScoreKeys; ++key) {
            Vec x = splat(keys[key * ld + d]);
#pragma GCC unroll 8
            for (int v = 0; v < kVecs; ++v) sum[key][v] += x * query[v];
        }
    }
#pragma GCC unroll 8
    for (int key = 0; key < kScoreKeys; ++key)
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v)
            store(scores + key * kScoreStride + v * kLanes, sum[key][v] * scale);
}

static void score(const float* queries, const float* keys, int ld, int dim, int panels, float scale,
                  float* scores) {
    constexpr int kStep = kLanes == 16 ? 2 : 1;  // panels at a time
    int panel = 0;
    for (; panel + kStep <= panels; panel += kStep)
        for (int key = 0; key < kTileKeys; key += kScoreKeys)
            score_keys<kStep>(queries + panel * dim * kPanelRows, keys + key * ld, ld, dim, scale,
                              scores + key * kScoreStride + panel * kPanelRows);
    for (; panel < panels; ++panel)
        for (int key = 0; key < kTileKeys; key += kScoreKeys)
            score_keys<1>(queries + panel * dim * kPanelRows, keys + key * ld, ld, dim, scale,
                          scores + key * kScoreStride + panel * kPanelRows);
}

template <int kWidth>
struct Floats {
    typedef float Type __attribute__((vector_size(4 * kWidth)));
};

// The sum of kWidth numbers in memory, by halves; they are overwritten.
template <int kWidth>
CONDENSATE_INLINE float add_lanes(float* lanes) {
    if constexpr (kWidth == 2) {
        return lanes[0] + lanes[1];
    } else {
        using Half = typename Floats<kWidth / 2>::Type;
        store(lanes, load<Half>(lanes) + load<Half>(lanes + kWidth / 2));
        return add_lanes<kWidth / 2>(lanes);
    }
}

// kKeys chains for each of kRows rows.
template <int kRows, int kKeys>
CONDENSATE_INLINE void score_few(const float* queries, const float* keys, int ld, int dim,
                                 float scale, float* scores) {
    Vec sum[kRows][kKeys];
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 8
        for (int key = 0; key < kKeys; ++key) sum[row][key] = splat(0.0f);
    for (int d = 0; d < dim; d += kLanes) {
        Vec part[kKeys];
#pragma GCC unroll 8
        for (int key = 0; key < kKeys; ++key) part[key] = load<Vec>(keys + key * ld + d);
#pragma GCC unroll 8
        for (int row = 0; row < kRows; ++row) {
            const Vec query = load<Vec>(queries + row * dim + d);
#pragma GCC unroll 8
            for (int key = 0; key < kKeys; ++key) sum[row][key] += query * part[key];
        }
    }
    float lanes[kKeys][kRows][kLanes];
#pragma GCC unroll 8
    for (int key = 0; key < kKeys; ++key)
#pragma GCC unroll 8
        for (int row = 0; row < kRows; ++row) store(lanes[key][row], sum[row][key]);
    for (int key = 0; key < kKeys; ++key)
        for (int row = 0; row < kRows; ++row)
            scores[key * kScoreStride + row] = add_lanes<kLanes>(lanes[key][row]) * scale;
}

static void score_rows(const float* queries, const float* keys, int ld, int dim, int rows,
                       float scale, float* scores) {
    constexpr int kKeys = kLanes == 16 ? 4 : 2;
    for (int key = 0; key < kTileKeys; key += kKeys, keys += kKeys * ld) {
        float* target = scores + key * kScoreStride;
        int row = 0;
        for (; row + 4 <= rows; row += 4)
            score_few<4, kKeys>(queries + row * dim, keys, ld, dim, scale, target + row);
        for (; row < rows; ++row)
            score_few<1, kKeys>(queries + row * dim, keys, ld, dim, scale, target + row);
    }
}

static void mask(const RowMask& mask, int panels, float* scores) {
    for (int row = 0; row < panels * kPanelRows; row += kLanes) {
        const IntVec visible_end = load<IntVec>(mask.visible_end + row);
        const IntVec free_end = load<IntVec>(mask.free_end + row);
        const IntVec window_begin = load<IntVec>(mask.window_begin + row);
        const IntVec window_end = load<IntVec>(mask.window_end + row);
        const Vec threshold = load<Vec>(mask.threshold + row);
        const IntVec tie_end = load<IntVec>(mask.tie_end + row);
        for (int32_t k = 0; k < kTileKeys; ++k) {
            const IntVec key = splat(k);
            float* at = scores + k * kScoreStride + row;
            Vec x = load<Vec>(at);
            IntVec selected = (x > threshold) | ((x == threshold) & (key < tie_end));
            IntVec ranged =
                (key < free_end) | ((key >= window_begin) & (key < window_end)) | selected;
            store(at, ((key < visible_end) & ranged) != 0 ? x : splat(-kInf));
        }
    }
}

// ---- Softmax ----

static void softmax(int panels, float* scores, SoftmaxState* state) {
    for (int row = 0; row < panels * kPanelRows; row += kLanes) {
        float* column = scores + row;
        Vec old_max = load<Vec>(state->max + row);
        Vec best[4] = {old_max, old_max, old_max, old_max};
        for (int key = 0; key < kTileKeys; key += 4)
#pragma GCC unroll 4
            for (int n = 0; n < 4; ++n)
                best[n] = vmax(best[n], load<Vec>(column + (key + n) * kScoreStride));
        Vec max = vmax(vmax(best[0], best[1]), vmax(best[2], best[3]));
        // A row without a key so far has no finite maximum to subtract.
        Vec base = max == -kInf ? splat(0.0f) : max;
        Vec total[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
        for (int key = 0; key < kTileKeys; key += 4)
#pragma GCC unroll 4
            for (int n = 0; n < 4; ++n) {
                float* at = column + (key + n) * kScoreStride;
                Vec weight = exp_nonpositive(load<Vec>(at) - base);
                store(at, weight);
                total[n] += weight;
            }
        Vec rescale = exp_nonpositive(old_max - base);
        Vec sum = load<Vec>(state->sum + row) * rescale;
        Vec added = ((total[0] + total[1]) + (total[2] + total[3])) -
                    load<Vec>(state->sum_error + row) * rescale;
        Vec new_sum = sum + added;
        store(state->sum_error + row, (new_sum - sum) - added);
        store(state->sum + row, new_sum);
        store(state->max + row, max);
        store(state->rescale + row, rescale);
    }
}

// ---- Weighted values ----

constexpr int kValueRows = 4;
constexpr int kValueVecs = kLanes == 16 ? 4 : 2;  // vectors of columns in registers

template <int kVecs>
CONDENSATE_INLINE void accumulate_rows(const float* weights, const float* values, int ld,
                                       const float* rescale, float* out) {
    Vec sum[kValueRows][kVecs];
#pragma GCC unroll 8
    for (int row = 0; row < kValueRows; ++row)
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v)
            sum[row][v] = load<Vec>(out + row * ld + v * kLanes) * rescale[row];
    for (int key = 0; key < kTileKeys; ++key) {
        Vec value[kVecs];
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) value[v] = load<Vec>(values + key * ld + v * kLanes);
#pragma GCC unroll 8
        for (int row = 0; row < kValueRows; ++row) {
            Vec weight = splat(weights[key * kScoreStride + row]);
#pragma GCC unroll 8
            for (int v = 0; v < kVecs; ++v) sum[row][v] += weight * value[v];
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < kValueRows; ++row)
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) store(out + row * ld + v * kLanes, sum[row][v]);
}

static void accumulate(const float* weights, const float* values, int ld, int rows,
                       const float* rescale, float* out) {
    int column = 0;
    for (; column + kValueVecs * kLanes <= ld; column += kValueVecs * kLanes)
        for (int row = 0; row < rows; row += kValueRows)
            accumulate_rows<kValueVecs>(weights + row, values + column, ld, rescale + row,
                                        out + row * ld + column);
    for (; column < ld; column += kLanes)
        for (int row = 0; row < rows; row += kValueRows)
            accumulate_rows<1>(weights + row, values + column, ld, rescale + row,
                               out + row * ld + column);
}

// ---- Block masses ----

static void block_sums(const float* scores, int units, const int32_t* visible_end, int panels,
                       float* block_max, float* block_sum) {
    const int rows = panels * kPanelRows;
    for (int first = 0; first < kTileKeys; first += units) {
        for (int row = 0; row < rows; row += kLanes) {
            const IntVec end = load<IntVec>(visible_end + row);
            Vec max = splat(-kInf);
            IntVec is_nan = splat(0);
            for (int unit = first; unit < first + units; ++unit) {
                Vec x = load<Vec>(scores + unit * kScoreStride + row);
                IntVec visible = splat(unit) < end;
                is_nan |= visible & (x != x);
                max = (visible & (x > max)) != 0 ? x : max;
            }
            IntVec finite = (max > -kInf) & (max < kInf);
            Vec base = finite != 0 ? max : splat(0.0f);
            Vec sum = splat(0.0f);
            for (int unit = first; unit < first + units; ++unit) {
                Vec x = load<Vec>(scores + unit * kScoreStride + row);
                sum += splat(unit) < end ? exp_nonpositive(x - base) : splat(0.0f);
            }
            sum = finite != 0 ? sum : splat(0.0f);
            sum = max == kInf ? splat(1.0f) : sum;
            store(block_max + row, max);
            store(block_sum + row, is_nan != 0 ? splat(0.0f) : sum);
        }
        block_max += rows;
        block_sum += rows;
    }
}

static float block_mass(const float* block_max, const float* block_sum, const float* norm_max,
                        const float* norm_inverse, int panels, float* mass) {
    constexpr float kLargest = 3.40282347e+38f;
    Vec best = splat(0.0f);
    for (int row = 0; row < panels * kPanelRows; row += kLanes) {
        Vec x = load<Vec>(block_max + row) - load<Vec>(norm_max + row);
        // In two factors, so that the exponential overflows only where the mass does.
        IntVec large = x > 32.0f;
        x = large != 0 ? x - 32.0f : x;
        x = x > 80.0f ? splat(80.0f) : x;
        Vec m = load<Vec>(block_sum + row) * load<Vec>(norm_inverse + row) * exp_nonpositive(x);
        m *= large != 0 ? splat(7.89629602e+13f) : splat(1.0f);  // e^32
        m = m > kLargest ? splat(kLargest) : m;
        store(mass + row, m);
        best = vmax(best, m);
    }
    float largest = 0.0f;
    for (int lane = 0; lane < kLanes; ++lane) largest = best[lane] > largest ? best[lane] : largest;
    return largest;
}

// ---- Rows of scores ----

static float log_sum_exp(const float* scores, int64_t n) {
    Vec best = splat(-kInf);
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) best = vmax(best, load<Vec>(scores + j));
    float max = -kInf;
    for (int lane = 0; lane < kLanes; ++lane) max = best[lane] > max ? best[lane] : max;
    for (; j < n; ++j) max = scores[j] > max ? scores[j] : max;
    const float base = max == -kInf ? 0.0f : max;
    double sum = 0;  // of partial sums that are short enough for float32
    constexpr int64_t kPart = 64 * kLanes;
    for (int64_t begin = 0; begin < n; begin += kPart) {
        Vec part = splat(0.0f);
        int64_t end = begin + kPart < n ? begin + kPart : n;
        for (j = begin; j + kLanes <= end; j += kLanes)
            part += exp_nonpositive(load<Vec>(scores + j) - base);
        if (j < end) {
            float rest[kLanes];
            for (int lane = 0; lane < kLanes; ++lane)
                rest[lane] = j + lane < end ? scores[j + lane] : -kInf;
            part += exp_nonpositive(load<Vec>(rest) - base);
        }
        for (int lane = 0; lane < kLanes; ++lane) sum += static_cast<double>(part[lane]);
    }
    return max == -kInf && sum == 0
               ? -kInf
               : static_cast<float>(static_cast<double>(base) + __builtin_log(sum));
}

static void order_keys(const float* scores, int64_t n, uint32_t* keys) {
    int64_t j = 0;
    for (; j < n; j += kLanes) {
        Vec x;
        if (j + kLanes <= n) {
            x = load<Vec>(scores + j);
        } else {
            float rest[kLanes] = {};
            __builtin_memcpy(rest, scores + j, static_cast<size_t>(n - j) * sizeof(float));
            x = load<Vec>(rest);
        }
        Vec canonical = x + 0.0f;  // -0 equals +0
        UintVec bits = load<UintVec>(&canonical);
        UintVec key = (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
        key = x != x ? UintVec{} : key;
        if (j + kLanes <= n)
            store(keys + j, key);
        else
            __builtin_memcpy(keys + j, &key, static_cast<size_t>(n - j) * sizeof(uint32_t));
    }
}

#undef CONDENSATE_INLINE

static const TileOps kOps = {kName,      load_rows,  load_int8_rows, score,
                             score_rows, mask,       softmax,        accumulate,
                             block_sums, block_mass, log_sum_exp,    order_keys};
