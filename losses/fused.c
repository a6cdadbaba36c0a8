/* The elementwise part of one tile of the sigmoid loss, in one visit: cosines in, dL/dlogits out, sums on the way; and
   small things around it. Inductor (torch 2.9) stores e and softplus as whole tiles on CPU and needs 3 to 4 times as
   long; docs/numerics.md has the figures. */
#include "terms.h"

static inline Floats same(Floats f) { return f; }

/* The end of a row that fills no vector is padded with -infinity, which adds nothing. A row belongs to one thread, so
   the sums do not depend on how many there are. `sums` is (3, rows) with `stride` between its rows. */
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

DEFINE_TILE(tile_float32, float, Floats, all(-INFINITY), same, same)
DEFINE_TILE(tile_bfloat16, uint16_t, Halves, (Halves){} + (uint16_t)0xff80, widen, narrow)

/* The pairs of a tile, whose z must be large: sums += softplus(-z), -sigmoid(-z), -x * sigmoid(-z); x <- -sigmoid(-z).
   They stand `step` elements apart, from `x` on, one in each row; `cosines` has them unrounded. */
#define DEFINE_PAIRS(NAME, TYPE, STORE)                                                                              \
    void NAME(TYPE *x, int64_t pairs, int64_t step, const float *cosines, float scale, float bias, float *sums,      \
              int64_t stride) {                                                                                      \
        for (int64_t i = 0; i < pairs; i++)                                                                          \
            x[i * step] = STORE(pair_terms(cosines[i], scale, bias, sums + i, stride));                              \
    }

static inline float same_one(float f) { return f; }
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
