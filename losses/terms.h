/* The terms of pairs of the sigmoid loss and their derivatives, as GCC's vector types instead of intrinsics: the same
   lines become SSE, AVX2, AVX-512 or NEON.

   z = scale * x + bias;  x <- sigmoid(z);  sums += softplus(z), sigmoid(z), x * sigmoid(z)

   softplus and sigmoid share e = exp(-|z|), which cannot overflow. An x of -infinity means "no such pair" (scale must
   be positive): it adds nothing and becomes 0 (1.6e-38, to be exact). The number of instructions decides the time,
   since an iteration's chain is longer than what a core keeps in flight. */
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

/* The larger one; b where one is NaN. Of the comparison GCC makes three instructions. */
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
    return (Floats)((Ints)p + ((Ints)shifted << 23)); /* k onto the exponent */
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

/* The loss is a sum of max(z, 0) and of log(1 + e). The latter are gathered as their product, which takes two
   instructions a term and rounds as a sum does, where a logarithm takes eight: q = (1 + e_1) (1 + e_2) .. - 1, and
   1 + e is 2 at the most. */
#define MAX_TERMS 120 /* 2^120 is a float yet */
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
    /* A cosine is above -2; without the bound "no such pair" would add -infinity * 1.6e-38. */
    sums->grad_scale += max_of(all(-2.0f), x) * sigmoid;
    return sigmoid;
}

static inline void fold(Sums *sums) {
    sums->loss += log1p_of(sums->q);
    sums->q = all(0.0f);
}

static inline Floats widen(Halves h) { return (Floats)(__builtin_convertvector(h, Words) << 16); }

/* To bfloat16, nearest even. A NaN stays one: those of arithmetic have their lower half empty. */
static inline Halves narrow(Floats f) {
    Words u = (Words)f;
    return __builtin_convertvector((u + 0x7fff + ((u >> 16) & 1)) >> 16, Halves);
}

static inline uint16_t narrow_one(float f) { return narrow(all(f))[0]; }

static inline float widen_one(uint16_t h) { return widen((Halves){h})[0]; }

/* Adds the lanes to one row of `sums`, which is (3, rows) with `stride` between its rows. */
static inline void add_sums(Sums *vector, float *sums, int64_t stride) {
    fold(vector);
    for (int lane = 0; lane < LANES; lane++) {
        sums[0] += vector->loss[lane];
        sums[stride] += vector->grad_bias[lane];
        sums[2 * stride] += vector->grad_scale[lane];
    }
}

/* dL/dz of a positive pair, whose z must be large: sums += softplus(-z), -sigmoid(-z), -x * sigmoid(-z) */
static inline float pair_terms(float x, float scale, float bias, float *sums, int64_t stride) {
    float z = scale * x + bias, e = expf(-fabsf(z)), dz = (z > 0 ? e : 1.0f) / -(1.0f + e);
    sums[0] += (z > 0 ? 0.0f : -z) + log1pf(e);
    sums[stride] += dz;
    sums[2 * stride] += x * dz;
    return dz;
}
