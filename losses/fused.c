/* The elementwise part of one tile of the sigmoid loss, in one visit: cosines in, dL/dlogits out, sums on the way.

   z = scale * x + bias;  x <- sigmoid(z);  row sums += softplus(z), sigmoid(z), x * sigmoid(z)

   softplus and sigmoid share e = exp(-|z|), which cannot overflow. An x of -infinity means "no such pair" (scale must
   be positive): it adds nothing and becomes 0 (1.6e-38, to be exact). GCC's vector types instead of intrinsics: the
   same lines become SSE, AVX2, AVX-512 or NEON. The number of instructions decides the time, since an iteration's
   chain is longer than what a core keeps in flight. Inductor (torch 2.9) stores e and softplus as whole tiles on CPU
   and needs 3 to 4 times as long; docs/numerics.md has the figures. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
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

/* exp(y) for y <= 0: 2^k times a polynomial on [-log(2)/2, log(2)/2] (Chebyshev interpolation, relative error 3e-7; the
   rounding of y itself costs |y| * 6e-8). Below -87, where float32 leaves its normal range, the value of -87. */
static inline Floats exp_of_negative(Floats y) {
    y = choose(y < all(-87.0f), all(-87.0f), y);
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

typedef struct {
    Floats loss, grad_bias, grad_scale;
} Sums;

static inline Floats terms(Floats x, float scale, float bias, Sums *sums) {
    Floats z = x * scale + bias;
    Floats e = exp_of_negative((Floats)((Ints)z | (Ints)all(-0.0f)));
    Ints positive = z > all(0.0f);
    sums->loss += choose(positive, z, all(0.0f)) + log1p_of_fraction(e);
    Floats sigmoid = choose(positive, all(1.0f), e) / (1.0f + e);
    sums->grad_bias += sigmoid;
    /* A cosine is above -2; without the bound "no such pair" would add -infinity * 1.6e-38. */
    sums->grad_scale += choose(x > all(-2.0f), x, all(-2.0f)) * sigmoid;
    return sigmoid;
}

static inline Floats widen(Halves h) { return (Floats)(__builtin_convertvector(h, Words) << 16); }

/* To bfloat16, nearest even. A NaN stays one: those of arithmetic have their lower half empty. */
static inline Halves narrow(Floats f) {
    Words u = (Words)f;
    return __builtin_convertvector((u + 0x7fff + ((u >> 16) & 1)) >> 16, Halves);
}

static inline Floats same(Floats f) { return f; }

/* The end of a row that fills no vector is padded with -infinity, which adds nothing. A row belongs to one thread, so
   the sums do not depend on how many there are. `sums` is (3, rows) with `stride` between its rows. */
#define DEFINE_TILE(NAME, TYPE, VECTOR, PADDING, LOAD, STORE)                                                        \
    static void NAME##_row(TYPE *row, int64_t columns, float scale, float bias, float *sums, int64_t stride) {       \
        Sums vector = {};                                                                                            \
        VECTOR x;                                                                                                    \
        int64_t j = 0;                                                                                               \
        for (; j + LANES <= columns; j += LANES) {                                                                   \
            memcpy(&x, row + j, sizeof x);                                                                           \
            x = STORE(terms(LOAD(x), scale, bias, &vector));                                                         \
            memcpy(row + j, &x, sizeof x);                                                                           \
        }                                                                                                            \
        if (j < columns) {                                                                                           \
            x = PADDING;                                                                                             \
            memcpy(&x, row + j, (columns - j) * sizeof(TYPE));                                                       \
            x = STORE(terms(LOAD(x), scale, bias, &vector));                                                         \
            memcpy(row + j, &x, (columns - j) * sizeof(TYPE));                                                       \
        }                                                                                                            \
        for (int lane = 0; lane < LANES; lane++) {                                                                   \
            sums[0] += vector.loss[lane];                                                                            \
            sums[stride] += vector.grad_bias[lane];                                                                  \
            sums[2 * stride] += vector.grad_scale[lane];                                                             \
        }                                                                                                            \
    }                                                                                                                \
    void NAME(TYPE *x, int64_t rows, int64_t columns, float scale, float bias, float *sums, int64_t stride) {        \
        _Pragma("omp parallel for schedule(static)") for (int64_t i = 0; i < rows; i++)                              \
            NAME##_row(x + i * columns, columns, scale, bias, sums + i, stride);                                     \
    }

DEFINE_TILE(tile_float32, float, Floats, all(-INFINITY), same, same)
DEFINE_TILE(tile_bfloat16, uint16_t, Halves, (Halves){} + (uint16_t)0xff80, widen, narrow)

/* The pairs of a tile, whose z must be large: sums += softplus(-z), -sigmoid(-z), -x * sigmoid(-z); x <- -sigmoid(-z).
   They stand `step` elements apart, from `x` on, one in each row; `cosines` has them unrounded. */
#define DEFINE_PAIRS(NAME, TYPE, STORE)                                                                              \
    void NAME(TYPE *x, int64_t pairs, int64_t step, const float *cosines, float scale, float bias, float *sums,      \
              int64_t stride) {                                                                                      \
        for (int64_t i = 0; i < pairs; i++) {                                                                        \
            float z = scale * cosines[i] + bias, e = expf(-fabsf(z)), dz = (z > 0 ? e : 1.0f) / -(1.0f + e);         \
            sums[i] += (z > 0 ? 0.0f : -z) + log1pf(e);                                                              \
            sums[stride + i] += dz;                                                                                  \
            sums[2 * stride + i] += cosines[i] * dz;                                                                 \
            x[i * step] = STORE(dz);                                                                                 \
        }                                                                                                            \
    }

static inline float same_one(float f) { return f; }
static inline uint16_t narrow_one(float f) { return narrow(all(f))[0]; }
DEFINE_PAIRS(pairs_float32, float, same_one)
DEFINE_PAIRS(pairs_bfloat16, uint16_t, narrow_one)

/* dots[i] = left[i] . right[i] of bfloat16 rows, without their float32 copies. */
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

/* out = (bfloat16) (in * factor) */
void scale_to_bfloat16(const float *in, int64_t size, float factor, uint16_t *out) {
    int64_t whole = size / LANES * LANES;
    _Pragma("omp parallel for schedule(static)") for (int64_t i = 0; i < whole; i += LANES) {
        Floats f;
        memcpy(&f, in + i, sizeof f);
        Halves h = narrow(f * factor);
        memcpy(out + i, &h, sizeof h);
    }
    for (int64_t i = whole; i < size; i++) out[i] = narrow_one(in[i] * factor);
}

/* sum += (float) addend, without the float32 copy that torch's mixed add makes first. */
void add_bfloat16(float *sum, const uint16_t *addend, int64_t size) {
    int64_t whole = size / LANES * LANES;
    _Pragma("omp parallel for schedule(static)") for (int64_t i = 0; i < whole; i += LANES) {
        Halves h;
        Floats f;
        memcpy(&h, addend + i, sizeof h);
        memcpy(&f, sum + i, sizeof f);
        f += widen(h);
        memcpy(sum + i, &f, sizeof f);
    }
    for (int64_t i = whole; i < size; i++) {
        uint32_t bits = (uint32_t)addend[i] << 16;
        float f;
        memcpy(&f, &bits, sizeof f);
        sum[i] += f;
    }
}
