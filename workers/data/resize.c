/* Antialiased bicubic or bilinear of uint8 RGB pixels, for processors with AVX2 or AVX-512: the same bytes as torch's
   `_upsample_bicubic2d_aa` and `_upsample_bilinear2d_aa`, which are torchvision's `resize(..., antialias=True)`. That fixes the arithmetic. Weights
   have 16 bits, at the largest scale that the largest weight of an axis allows. Rows are resized first and rounded to
   bytes, then columns. Only the order of the work is free.

   Several rows are summed at once. A lane of a vector is a row; its 32 bits are two neighbouring pixels of one channel,
   a "unit", which the processor multiplies and adds in one step. The sums of a strip of rows come out as units of the
   other direction, two neighbouring rows of one channel, so a column's sum needs its multiplications only. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>

#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define CEIL(a, b) (((a) + (b)-1) / (b))
#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512BW__) && defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#define WIDE 1
typedef __m512i Vector;
#define OP(NAME) _mm512_##NAME
#define ZERO _mm512_setzero_si512()
#define LOAD(P) _mm512_load_si512(P)
#define STORE(P, X) _mm512_store_si512(P, X)
#define WORDS(IMMEDIATE, A, B) (Vector) _mm512_shuffle_ps((__m512)(A), (__m512)(B), IMMEDIATE)
#define EVEN_LANES(A, B) _mm512_shuffle_i64x2(A, B, 0x88)
#define ODD_LANES(A, B) _mm512_shuffle_i64x2(A, B, 0xdd)
#define ADD_PRODUCTS(SUM, A, B) _mm512_dpwssd_epi32(SUM, A, B)
#else
#define WIDE 0
typedef __m256i Vector;
#define OP(NAME) _mm256_##NAME
#define ZERO _mm256_setzero_si256()
#define LOAD(P) _mm256_load_si256((const Vector *)(P))
#define STORE(P, X) _mm256_store_si256((Vector *)(P), X)
#define WORDS(IMMEDIATE, A, B) (Vector) _mm256_shuffle_ps((__m256)(A), (__m256)(B), IMMEDIATE)
#define EVEN_LANES(A, B) _mm256_permute2x128_si256(A, B, 0x20)
#define ODD_LANES(A, B) _mm256_permute2x128_si256(A, B, 0x31)
#define ADD_PRODUCTS(SUM, A, B) _mm256_add_epi32(SUM, _mm256_madd_epi16(A, B))
#endif

#define ROWS ((int)sizeof(Vector) / 4)
#define CHUNK 16                  /* pixels that become units at once */
#define UNITS (3 * CHUNK / 2)     /* of a chunk */
#define COLUMNS (4 * ROWS)        /* bytes of a row that are made at once */
#define GROUP ROWS                /* pixels of a row whose sums are stored at once */

typedef struct {
    int64_t taps;      /* at most, of a pixel */
    int64_t pairs;     /* of taps, the first of which is even */
    int precision;     /* fractional bits of a weight */
    int32_t *first;    /* even: of each pixel */
    int32_t *weights;  /* (pixels, pairs) two of 16 bits */
} Axis;

/* reach: of the filter in pixels, 2 of the cubic, 1 of the linear. */
static int64_t most_taps(int64_t from, int64_t to, int reach) {
    double scale = (double)from / (double)to, support = scale >= 1 ? reach * scale : reach;
    int64_t whole = (int64_t)support;
    return 2 * (whole + (whole < support)) + 1;
}

/* Keys' cubic, a = -0.5; x is not negative. */
INLINE double cubic(double x) {
    double near = (1.5 * x - 2.5) * x * x + 1, far = ((-0.5 * x + 2.5) * x - 4) * x + 2;
    return x < 1 ? near : x < 2 ? far : 0;
}

INLINE double linear(double x) { return x < 1 ? 1 - x : 0; }

/* Compute the weights of pixels [offset, offset + count) of `to` pixels made of `from`. memory: (taps + 5) * to
   doubles. The order of operations is torch's. */
static void plan(Axis *axis, int64_t from, int64_t to, int64_t offset, int64_t count, int reach, double *memory) {
    double scale = (double)from / (double)to, support = scale >= 1 ? reach * scale : reach;
    double shrink = scale >= 1 ? 1 / scale : 1;
    double *centers = memory, *firsts = centers + to, *ends = firsts + to, *totals = ends + to;
    double *tops = totals + to, *weights = tops + to, largest = 0;
    int64_t taps = axis->taps;
    for (int64_t i = 0; i < to; i++) {
        centers[i] = scale * (i + 0.5);
        firsts[i] = MAX((int32_t)(centers[i] - support + 0.5), 0);
        ends[i] = MIN((int32_t)(centers[i] + support + 0.5), (int32_t)from);
        totals[i] = tops[i] = 0;
    }
    for (int64_t j = 0; j < taps; j++)
        for (int64_t i = 0; i < to; i++) {
            double at = firsts[i] + j, x = (at - centers[i] + 0.5) * shrink, far = x < 0 ? -x : x;
            double weight = reach == 2 ? cubic(far) : linear(far);
            weights[j * to + i] = weight = at < ends[i] ? weight : 0;
            totals[i] += weight;
        }
    for (int64_t j = 0; j < taps; j++)
        for (int64_t i = 0; i < to; i++) {
            double weight = weights[j * to + i] /= totals[i];
            tops[i] = MAX(tops[i], weight);
        }
    for (int64_t i = 0; i < to; i++) largest = MAX(largest, tops[i]);
    int precision = 0;
    while (precision < 22 && (int64_t)(0.5 + largest * (1 << (precision + 1))) < 1 << 15) precision++;
    axis->precision = precision;
    memset(axis->weights, 0, 4 * axis->pairs * count);
    for (int64_t i = 0; i < count; i++) {
        int32_t first = (int32_t)firsts[offset + i];
        int16_t *to_weights = (int16_t *)(axis->weights + i * axis->pairs) + first % 2;
        for (int64_t j = 0; j < taps; j++) {
            double weight = weights[j * to + offset + i] * (1 << precision);
            to_weights[j] = (int16_t)(weight < 0 ? weight - 0.5 : weight + 0.5);
        }
        axis->first[i] = first - first % 2;
    }
}

/* Places of the four bytes of unit U of a chunk, counted from byte FROM; -1 is a zero. */
#define UNIT(U, FROM) 6 * ((U) / 3) + (U) % 3 - (FROM), -1, 6 * ((U) / 3) + (U) % 3 + 3 - (FROM), -1
#define FOUR(U, FROM) UNIT(U, FROM), UNIT(U + 1, FROM), UNIT(U + 2, FROM), UNIT(U + 3, FROM)

/* Vector i of eight: units 8 part to 8 part + 7 of a row or, in wide vectors, of two rows four apart, so that the lanes
   are in the order of rows after the transposition. */
INLINE Vector eight_units(const uint8_t *const *rows, int i, int part) {
#if WIDE
#define BOTH(U, FROM) {FOUR(U, FROM), FOUR(U + 4, FROM), FOUR(U, FROM - 32), FOUR(U + 4, FROM - 32)}
    static const int8_t places[3][64] __attribute__((aligned(64))) = {BOTH(0, 0), BOTH(8, 12), BOTH(16, 16)};
    static const int from[3] = {0, 12, 16};
    const uint8_t *row = rows[i < 4 ? i : i + 4] + from[part], *other = rows[i < 4 ? i + 4 : i + 8] + from[part];
    Vector bytes = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)row));
    bytes = _mm512_inserti64x4(bytes, _mm256_loadu_si256((const __m256i *)other), 1);
    return _mm512_maskz_permutexvar_epi8(0x5555555555555555, LOAD(places[part]), bytes);
#else
    static const int8_t places[3][32] __attribute__((aligned(32))) = {
        {FOUR(0, 0), FOUR(4, 6)}, {FOUR(8, 12), FOUR(12, 24)}, {FOUR(16, 30), FOUR(20, 32)}};
    static const int low[3] = {0, 12, 30}, high[3] = {6, 24, 32};
    __m128i first = _mm_loadu_si128((const __m128i *)(rows[i] + low[part]));
    __m128i second = _mm_loadu_si128((const __m128i *)(rows[i] + high[part]));
    Vector bytes = _mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1);
    return _mm256_shuffle_epi8(bytes, LOAD(places[part]));
#endif
}

/* A chunk of ROWS rows -> its units: unit 3 p + c is pixels 2 p and 2 p + 1 in channel c. The rows have `size` bytes
   left. */
INLINE void make_units(const uint8_t *const *rows, int64_t size, Vector *units) {
    uint8_t ends[ROWS][3 * CHUNK];
    const uint8_t *padded[ROWS];
    if (size < 3 * CHUNK) {
        memset(ends, 0, sizeof ends);
        for (int i = 0; i < ROWS; i++) memcpy(ends[i], rows[i], size), padded[i] = ends[i];
        rows = padded;
    }
#pragma GCC unroll 3
    for (int part = 0; part < 3; part++, units += 8) {
        Vector r[8], t[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) r[i] = eight_units(rows, i, part);
#pragma GCC unroll 4
        for (int i = 0; i < 8; i += 2) {
            t[i] = OP(unpacklo_epi32)(r[i], r[i + 1]);
            t[i + 1] = OP(unpackhi_epi32)(r[i], r[i + 1]);
        }
#pragma GCC unroll 2
        for (int i = 0; i < 8; i += 4) {
            r[i] = OP(unpacklo_epi64)(t[i], t[i + 2]);
            r[i + 1] = OP(unpackhi_epi64)(t[i], t[i + 2]);
            r[i + 2] = OP(unpacklo_epi64)(t[i + 1], t[i + 3]);
            r[i + 3] = OP(unpackhi_epi64)(t[i + 1], t[i + 3]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            STORE(units + i, EVEN_LANES(r[i], r[i + 4]));
            STORE(units + 4 + i, ODD_LANES(r[i], r[i + 4]));
        }
    }
}

/* Transpose as many vectors as a vector has lanes, and store them `step` bytes apart. */
INLINE void store_transposed(const Vector *x, uint8_t *out, int64_t step) {
#if WIDE
    Vector a = _mm512_shuffle_i64x2(x[0], x[1], 0x44), b = _mm512_shuffle_i64x2(x[2], x[3], 0x44);
    Vector c = _mm512_shuffle_i64x2(x[0], x[1], 0xee), d = _mm512_shuffle_i64x2(x[2], x[3], 0xee);
    STORE(out, EVEN_LANES(a, b));
    STORE(out + step, ODD_LANES(a, b));
    STORE(out + 2 * step, EVEN_LANES(c, d));
    STORE(out + 3 * step, ODD_LANES(c, d));
#else
    STORE(out, EVEN_LANES(x[0], x[1]));
    STORE(out + step, ODD_LANES(x[0], x[1]));
#endif
}

/* Two columns of sums -> bytes in 16 bits; the words of a lane are pairs of rows, column by column. */
INLINE Vector clamped(Vector a, Vector b) {
    const Vector most = OP(set1_epi16)(255);
    return OP(min_epi16)(OP(max_epi16)(OP(packs_epi32)(a, b), ZERO), most);
}

/* ROWS rows of pixels -> ROWS / 2 rows of units, `line` bytes each, of `count` pixels, a multiple of GROUP. */
INLINE void resize_rows(const int64_t pairs, const uint8_t *const *rows, int64_t width, const Axis *axis, int64_t count,
                        Vector *units, uint8_t *out, int64_t line) {
    const Vector half = OP(set1_epi32)(1 << (axis->precision - 1));
    const __m128i shift = _mm_cvtsi32_si128(axis->precision);
    const int32_t *weights = axis->weights, *firsts = axis->first;
    const uint8_t *left[ROWS];
    int64_t made = 0; /* pixels; units are made just before use, while the first cache holds earlier units */
    for (int i = 0; i < ROWS; i++) left[i] = rows[i];
    for (int64_t x = 0; x < count; x += GROUP, firsts += GROUP, out += 4 * 3 * GROUP) {
        Vector sums[3 * GROUP];
        for (; made < MIN(width, firsts[GROUP - 1] + 2 * pairs); made += CHUNK) {
            make_units(left, 3 * (width - made), units + 3 * made / 2);
            for (int i = 0; i < ROWS; i++) left[i] += 3 * CHUNK;
        }
        for (int i = 0; i < GROUP; i++, weights += pairs) {
            const Vector *unit = units + 3 * (firsts[i] / 2);
            Vector red = half, green = half, blue = half;
#pragma GCC unroll 8
            for (int64_t p = 0; p < pairs; p++, unit += 3) {
                Vector weight = OP(set1_epi32)(weights[p]);
                red = ADD_PRODUCTS(red, LOAD(unit), weight);
                green = ADD_PRODUCTS(green, LOAD(unit + 1), weight);
                blue = ADD_PRODUCTS(blue, LOAD(unit + 2), weight);
            }
            sums[3 * i] = OP(sra_epi32)(red, shift);
            sums[3 * i + 1] = OP(sra_epi32)(green, shift);
            sums[3 * i + 2] = OP(sra_epi32)(blue, shift);
        }
        for (int i = 0; i < 3 * GROUP; i += ROWS) {
            Vector even[ROWS / 4], odd[ROWS / 4];
#pragma GCC unroll 4
            for (int j = 0; j < ROWS / 4; j++) {
                const Vector *sum = sums + i + 4 * j;
                Vector a = clamped(sum[0], sum[1]), b = clamped(sum[2], sum[3]);
                even[j] = WORDS(0x88, a, b), odd[j] = WORDS(0xdd, a, b);
            }
            store_transposed(even, out + 4 * i, 2 * line);
            store_transposed(odd, out + 4 * i + line, 2 * line);
        }
    }
}

/* Rows of units -> a row of `size` bytes. */
INLINE void resize_column(const int64_t pairs, const uint8_t *units, int64_t line, const int32_t *weights,
                          int precision, uint8_t *out, int64_t size) {
    const Vector half = OP(set1_epi32)(1 << (precision - 1));
    const __m128i shift = _mm_cvtsi32_si128(precision);
#if WIDE
    const Vector order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
#else
    const Vector order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
#endif
    for (int64_t k = 0; k < size; k += COLUMNS, units += 4 * COLUMNS) {
        Vector sums[4] = {half, half, half, half};
        const uint8_t *row = units;
#pragma GCC unroll 8
        for (int64_t p = 0; p < pairs; p++, row += line) {
            Vector weight = OP(set1_epi32)(weights[p]);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++)
                sums[i] = ADD_PRODUCTS(sums[i], LOAD(row + i * sizeof(Vector)), weight);
        }
        for (int i = 0; i < 4; i++) sums[i] = OP(sra_epi32)(sums[i], shift);
        Vector bytes = OP(packus_epi16)(OP(packs_epi32)(sums[0], sums[1]), OP(packs_epi32)(sums[2], sums[3]));
#if WIDE
        bytes = _mm512_permutexvar_epi32(order, bytes);
#else
        bytes = _mm256_permutevar8x32_epi32(bytes, order);
#endif
        memcpy(out + k, &bytes, MIN(COLUMNS, size - k));
    }
}

/* The compiler unrolls a loop over a constant number of pairs: the usual numbers, for reductions of 1 to 3. */
#define FOR_PAIRS(PAIRS, CALL, ...)                                                                                    \
    switch (PAIRS) {                                                                                                   \
    case 3: CALL(3, __VA_ARGS__); break;                                                                               \
    case 4: CALL(4, __VA_ARGS__); break;                                                                               \
    case 5: CALL(5, __VA_ARGS__); break;                                                                               \
    case 6: CALL(6, __VA_ARGS__); break;                                                                               \
    case 7: CALL(7, __VA_ARGS__); break;                                                                               \
    default: CALL(PAIRS, __VA_ARGS__);                                                                                 \
    }

/* Resize (height, width, 3) pixels, rows `stride` bytes apart, to (to_height, to_width), and write the part
   (out_height, out_width) from (top, left) on. reach: 2 bicubic, 1 bilinear. Returns -1 if memory is missing. */
int resize_rgb(const uint8_t *pixels, int64_t stride, int64_t height, int64_t width, int64_t to_height,
               int64_t to_width, int64_t top, int64_t left, uint8_t *out, int64_t out_height, int64_t out_width,
               int reach) {
    Axis across = {.taps = most_taps(width, to_width, reach)}, down = {.taps = most_taps(height, to_height, reach)};
    across.pairs = across.taps / 2 + 1, down.pairs = down.taps / 2 + 1; /* one more, for an odd first pixel */
    int64_t groups = CEIL(out_width, GROUP) * GROUP, line = 4 * CEIL(3 * groups, COLUMNS) * COLUMNS;
    int64_t num_units = UNITS * CEIL(width, CHUNK), num_rows = CEIL(height, ROWS) * ROWS / 2 + down.pairs;
    int64_t unit_size = (num_units + 3 * across.pairs) * (int64_t)sizeof(Vector), lines_size = num_rows * line;
    int64_t plan_size = 8 * MAX((across.taps + 5) * to_width, (down.taps + 5) * to_height);
    int64_t across_size = 4 * groups * (across.pairs + 1), down_size = 4 * out_height * (down.pairs + 1);
    int64_t size = unit_size + lines_size + plan_size + across_size + down_size;
    uint8_t *memory = aligned_alloc(64, CEIL(size, 64) * 64);
    if (!memory) return -1;
    Vector *units = (Vector *)memory;
    uint8_t *lines = memory + unit_size;
    double *planning = (double *)(lines + lines_size);
    across.first = (int32_t *)((uint8_t *)planning + plan_size), across.weights = across.first + groups;
    down.first = across.weights + groups * across.pairs, down.weights = down.first + out_height;
    plan(&across, width, to_width, left, out_width, reach, planning);
    plan(&down, height, to_height, top, out_height, reach, planning);
    for (int64_t i = out_width; i < groups; i++) across.first[i] = across.first[out_width - 1];
    memset(across.weights + out_width * across.pairs, 0, 4 * (groups - out_width) * across.pairs);
    memset(units + num_units, 0, unit_size - num_units * sizeof(Vector)); /* after the last pixel, at weight 0 */
    int64_t begin = down.first[0], end = MIN(height, down.first[out_height - 1] + 2 * down.pairs);
    uint8_t *to = lines;
    for (int64_t y = begin; y < end; y += ROWS, to += ROWS / 2 * line) {
        const uint8_t *rows[ROWS];
        for (int i = 0; i < ROWS; i++) rows[i] = pixels + MIN(y + i, height - 1) * stride;
        FOR_PAIRS(across.pairs, resize_rows, rows, width, &across, groups, units, to, line)
    }
    for (int64_t y = 0; y < out_height; y++, out += 3 * out_width) {
        const uint8_t *from = lines + (down.first[y] - down.first[0]) / 2 * line;
        const int32_t *weights = down.weights + y * down.pairs;
        FOR_PAIRS(down.pairs, resize_column, from, line, weights, down.precision, out, 3 * out_width)
    }
    free(memory);
    return 0;
}
#endif
