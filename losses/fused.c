/* The elementwise part of a tile of the sigmoid loss in one pass: cosines in, dL/dlogits out, row sums in between; and
   a few small functions around that pass. Inductor (torch 2.9) stores e and softplus as whole tiles on CPU and takes 3
   to 4 times as long; docs/numerics.md has the figures.

   z = scale * x + bias;  x <- sigmoid(z);  sums += softplus(z), sigmoid(z), x * sigmoid(z)

   The code uses GCC's vector types instead of intrinsics: the same lines become SSE, AVX2, AVX-512 or NEON.

   softplus and sigmoid share e = exp(-|z|), which cannot overflow. An x of -infinity marks a pair that does not count
   (scale must be positive): it adds nothing and becomes 0 (1.6e-38, to be exact). The number of instructions decides
   the time: the dependency chain of one iteration is longer than what a core keeps in flight. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
#define LANES (BYTES / 4)

typedef float Floats __attribute__((vector_size(BYTES)));
typedef int32_t Ints __attribute__((vector_size(BYTES)));
typedef uint32_t Words __attribute__((vector_size(BYTES)));
typedef uint16_t Halves __attribute__((vector_size(BYTES / 2)));

static inline Floats all(float value) { return value - (Floats){}; }

static inline Floats choose(Ints mask, Floats yes, Floats no) {
    return (Floats)((mask & (Ints)yes) | (~mask & (Ints)no));
}

/* The maximum; b if either is NaN. GCC would compile the comparison to three instructions. */
static inline Floats max_of(Floats a, Floats b) {
#if defined(__AVX512F__)
    return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return choose(a > b, a, b);
#endif
}

/* exp(y) for y <= 0: 2^k times a polynomial on [-log(2)/2, log(2)/2] (Chebyshev interpolation, relative error 3e-7; the
   rounding of y itself costs |y| * 6e-8). Below -87, where float32 leaves its normal range, the value of -87. */
static inline Floats exp_of_negative(Floats y) {
    y = max_of(all(-87.0f), y);
    Floats shifted = y * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: k, rounded to nearest, in the lowest bits */
    Floats f = y - (shifted - 12582912.0f) * 0.69314718f;
    Floats p = all(0.008375128731131554f);
    p = p * f + 0.041917528957128525f;
    p = p * f + 0.16666415333747864f;
    p = p * f + 0.49998870491981506f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
    return (Floats)((Ints)p + ((Ints)shifted << 23)); /* adds k to the exponent */
}

/* log(1 + e) for 0 <= e <= 1: e times a polynomial (Chebyshev interpolation of log1p(e) / e, relative error 4e-7). */
static inline Floats log1p_of_fraction(Floats e) {
    Floats p = all(-0.008574675768613815f);
    p = p * e + 0.044214192777872086f;
    p = p * e - 0.10785368084907532f;
    p = p * e + 0.17757023870944977f;
    p = p * e - 0.2449961155653f;
    p = p * e + 0.3327617645263672f;
    p = p * e - 0.49997448921203613f;
    p = p * e + 0.9999998211860657f;
    return p * e;
}

/* log(1 + q) for q >= 0 */
static inline Floats log1p_of(Floats q) {
    Ints u = (Ints)(1.0f + q), exponent = (u >> 23) - 127;
    Floats fraction = (Floats)((u & 0x7fffff) | 0x3f800000) - 1.0f;
    Floats large = __builtin_convertvector(exponent, Floats) * 0.69314718f + log1p_of_fraction(fraction);
    return choose(q < all(1.0f), log1p_of_fraction(q), large);
}

/* The loss is a sum of max(z, 0) and of log(1 + e). The logarithms are summed as the logarithm of a product, which takes
   two instructions a term and rounds as a sum does; a logarithm takes eight: q = (1 + e_1) (1 + e_2) .. - 1, and 1 + e
   is at most 2. */
#define MAX_TERMS 120 /* 2^120 is still a float */
typedef struct {
    Floats loss, q, grad_bias, grad_scale;
} Sums;

static inline Floats terms(Floats x, float scale, float bias, Sums *sums) {
    Floats z = x * scale + bias;
    Floats e = exp_of_negative((Floats)((Ints)z | (Ints)all(-0.0f)));
    sums->loss += max_of(all(0.0f), z);
    sums->q += sums->q * e + e;
    Floats sigmoid = choose(z > all(0.0f), all(1.0f), e) / (1.0f + e);
    sums->grad_bias += sigmoid;
    /* A cosine is above -2; without the bound a pair that does not count would add -infinity * 1.6e-38. */
    sums->grad_scale += max_of(all(-2.0f), x) * sigmoid;
    return sigmoid;
}

static inline void fold(Sums *sums) {
    sums->loss += log1p_of(sums->q);
    sums->q = all(0.0f);
}

static inline Floats widen(Halves h) { return (Floats)(__builtin_convertvector(h, Words) << 16); }

/* To bfloat16, nearest even. A NaN stays NaN: arithmetic yields NaNs with an empty lower half. */
static inline Halves narrow(Floats f) {
    Words u = (Words)f;
    return __builtin_convertvector((u + 0x7fff + ((u >> 16) & 1)) >> 16, Halves);
}

static inline uint16_t narrow_one(float f) { return narrow(all(f))[0]; }

/* Add the lanes to one row of `sums`, which is (3, rows) with `stride` between its rows. */
static inline void add_sums(Sums *vector, float *sums, int64_t stride) {
    fold(vector);
    for (int lane = 0; lane < LANES; lane++) {
        sums[0] += vector->loss[lane];
        sums[stride] += vector->grad_bias[lane];
        sums[2 * stride] += vector->grad_scale[lane];
    }
}

/* dL/dz of a positive pair, whose z should be large: sums += softplus(-z), -sigmoid(-z), -x * sigmoid(-z) */
static inline float pair_terms(float x, float scale, float bias, float *sums, int64_t stride) {
    float z = scale * x + bias, e = expf(-fabsf(z)), dz = (z > 0 ? e : 1.0f) / -(1.0f + e);
    sums[0] += (z > 0 ? 0.0f : -z) + log1pf(e);
    sums[stride] += dz;
    sums[2 * stride] += x * dz;
    return dz;
}

/* The end of a row that fills no vector is padded with -infinity, which adds nothing. One thread computes a row, so the
   sums do not depend on the number of threads. `sums` is (3, rows) with `stride` between its rows. */
#define DEFINE_TILE(NAME, TYPE, VECTOR, PADDING, LOAD, STORE)                                                        \
    static void NAME##_row(TYPE *row, int64_t columns, float scale, float bias, float *sums, int64_t stride) {       \
        Sums vector = {};                                                                                            \
        VECTOR x;                                                                                                    \
        int64_t j = 0;                                                                                               \
        while (j + LANES <= columns) {                                                                               \
            int64_t end = j + LANES * (MAX_TERMS - 1) < columns ? j + LANES * (MAX_TERMS - 1) : columns;             \
            for (; j + LANES <= end; j += LANES) {                                                                   \
                memcpy(&x, row + j, sizeof x);                                                                       \
                x = STORE(terms(LOAD(x), scale, bias, &vector));                                                     \
                memcpy(row + j, &x, sizeof x);                                                                       \
            }                                                                                                        \
            fold(&vector);                                                                                           \
        }                                                                                                            \
        if (j < columns) {                                                                                           \
            x = PADDING;                                                                                             \
            memcpy(&x, row + j, (columns - j) * sizeof(TYPE));                                                       \
            x = STORE(terms(LOAD(x), scale, bias, &vector));                                                         \
            memcpy(row + j, &x, (columns - j) * sizeof(TYPE));                                                       \
        }                                                                                                            \
        add_sums(&vector, sums, stride);                                                                             \
    }                                                                                                                \
    void NAME(TYPE *x, int64_t rows, int64_t columns, float scale, float bias, float *sums, int64_t stride) {        \
        _Pragma("omp parallel for schedule(static)") for (int64_t i = 0; i < rows; i++)                              \
            NAME##_row(x + i * columns, columns, scale, bias, sums + i, stride);                                     \
    }

DEFINE_TILE(tile_float32, float, Floats, all(-INFINITY), (Floats), (Floats))
DEFINE_TILE(tile_bfloat16, uint16_t, Halves, (Halves){} + (uint16_t)0xff80, widen, narrow)

/* The positive pairs of a tile: `pair_terms` of each, x <- dL/dz. They are `step` elements apart, starting at `x`, one
   in each row; `cosines` holds their cosines unrounded. */
#define DEFINE_PAIRS(NAME, TYPE, STORE)                                                                              \
    void NAME(TYPE *x, int64_t pairs, int64_t step, const float *cosines, float scale, float bias, float *sums,      \
              int64_t stride) {                                                                                      \
        for (int64_t i = 0; i < pairs; i++)                                                                          \
            x[i * step] = STORE(pair_terms(cosines[i], scale, bias, sums + i, stride));                              \
    }

DEFINE_PAIRS(pairs_float32, float, (float))
DEFINE_PAIRS(pairs_bfloat16, uint16_t, narrow_one)

/* dots[i] = left[i] . right[i] of bfloat16 rows, without float32 copies of them. */
void dots_bfloat16(const uint16_t *left, const uint16_t *right, int64_t rows, int64_t columns, float *dots) {
    _Pragma("omp parallel for schedule(static)") for (int64_t i = 0; i < rows; i++) {
        const uint16_t *a = left + i * columns, *b = right + i * columns;
        Floats vector = {};
        Halves p, q;
        int64_t j = 0;
        for (; j + LANES <= columns; j += LANES) {
            memcpy(&p, a + j, sizeof p);
            memcpy(&q, b + j, sizeof q);
            vector += widen(p) * widen(q);
        }
        if (j < columns) {
            p = q = (Halves){};
            memcpy(&p, a + j, (columns - j) * sizeof *a);
            memcpy(&q, b + j, (columns - j) * sizeof *b);
            vector += widen(p) * widen(q);
        }
        float sum = 0;
        for (int lane = 0; lane < LANES; lane++) sum += vector[lane];
        dots[i] = sum;
    }
}
