/* A whole block of the sigmoid loss on float32 features, for processors with AMX: amx_bfloat16.c's three walks over
   pairs of panels, with products of float32 numbers that are made of products of 8-bit integers. The matrix unit takes
   32 of these where the vector units take one of float32, and adds them without rounding (the "Ozaki scheme" on
   integers, arXiv 2306.11975).

   A number x is factor * q, q an integer of 24 bits, and q three digits, 2^16 d0 + 2^8 d1 + d2, each from -128 to 127.
   The factor is what the largest number of its row, in a left matrix, or column, in a right one, asks for, so that it
   stands before the sum:

       sum_k x_ik y_kj = f_i f_j (2^32 sum d0 e0 + 2^24 sum (d0 e1 + d1 e0) + 2^16 sum (d0 e2 + d1 e1 + d2 e0))

   These sums, of three orders, are exact; they are put together in float32. The three products of lower order are left
   out: each is 2^-24 of the first, or less, with either sign. So a sum of products is about as good as float32's (the
   figures are in docs/numerics.md); what differs is that a number far below the largest of its row keeps fewer digits.

   dz of pairs is -1 where that of the others is 1e-5. It stays out of the matrices, in float32. */
#include "amx.h"

#if defined(__AMX_INT8__) && defined(__AVX512BW__) && defined(__AVX512VBMI__) && defined(__linux__)
#define TILE 1024 /* bytes */
#define ROWS 16   /* of what is worked on at once, 32 columns wide: two accumulators for each order of digits */
#define DIGITS 3
#define DEPTH 64  /* of the sum that one tile takes */
#define PANEL 512 /* digits of so many rows fit into a second cache of 2 MiB up to D = 1024 */
#define BLOCK (ROWS * EDGE)
#define LEFT_STEP (DIGITS * TILE)
#define RIGHT_STEP (2 * DIGITS * TILE)

_Static_assert(PANEL / 16 <= MAX_TERMS, "a strip's sums are folded at its end");

#define LEFT(DIGIT) _tile_loadd(6, left + (DIGIT)*TILE, 64)
#define MULTIPLY(SUM, DIGIT, HALF)                                                                                     \
    _tile_loadd(7, right + (2 * (DIGIT) + (HALF)) * TILE, 64);                                                         \
    _tile_dpbssd(SUM, 6, 7)

/* The product of 16 rows and 32 columns: sums (3, 16, 32) of digits by order. left: step after step three tiles of 16
   rows, a digit each; right: for each digit two of 16 columns. Between two uses of an accumulator lie three products of
   tiles: a result takes that long. */
static void multiply(const int8_t *left, const int8_t *right, int64_t steps, int32_t *sums) {
    char *to = (char *)sums;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    for (int64_t k = 0; k < steps; k++, left += LEFT_STEP, right += RIGHT_STEP) {
        LEFT(2);
        MULTIPLY(4, 0, 0);
        MULTIPLY(5, 0, 1);
        LEFT(0);
        MULTIPLY(0, 0, 0);
        MULTIPLY(1, 0, 1);
        MULTIPLY(4, 2, 0);
        MULTIPLY(5, 2, 1);
        MULTIPLY(2, 1, 0);
        MULTIPLY(3, 1, 1);
        LEFT(1);
        MULTIPLY(4, 1, 0);
        MULTIPLY(5, 1, 1);
        MULTIPLY(2, 0, 0);
        MULTIPLY(3, 0, 1);
    }
    _tile_stored(0, to, 4 * EDGE);
    _tile_stored(1, to + 64, 4 * EDGE);
    _tile_stored(2, to + 4 * BLOCK, 4 * EDGE);
    _tile_stored(3, to + 4 * BLOCK + 64, 4 * EDGE);
    _tile_stored(4, to + 8 * BLOCK, 4 * EDGE);
    _tile_stored(5, to + 8 * BLOCK + 64, 4 * EDGE);
}

/* Sums of digits by order -> 16 numbers, as float32. */
INLINE __m512 combined(const int32_t *sums, __m512 factors) {
    __m512 high = _mm512_cvtepi32_ps(_mm512_load_si512(sums));
    __m512 middle = _mm512_cvtepi32_ps(_mm512_load_si512(sums + BLOCK));
    __m512 low = _mm512_cvtepi32_ps(_mm512_load_si512(sums + 2 * BLOCK));
    return (high * 0x1p32f + (middle * 0x1p24f + low * 0x1p16f)) * factors;
}

INLINE __m512i magnitude(__m512 x) { return _mm512_and_si512((__m512i)x, _mm512_set1_epi32(0x7fffffff)); }

/* Of the bits of 16 largest magnitudes: what makes integers of 24 bits of such numbers, and the way back. Three digits
   reach to 0x7f7f7f = 8355711; a few less leave room for roundings. What lies all below 2^-100 is as good as nothing.
   Infinity and NaN make the way back NaN. */
INLINE void scales_of(__m512i largest, float *up, float *down) {
    __mmask16 not_finite = _mm512_cmpge_epi32_mask(largest, _mm512_set1_epi32(0x7f800000));
    __m512 most = _mm512_max_ps((__m512)largest, _mm512_set1_ps(0x1p-100f));
    _mm512_storeu_ps(up, 8355700.0f / most);
    _mm512_storeu_ps(down, _mm512_mask_blend_ps(not_finite, most / 8355700.0f, _mm512_set1_ps(NAN)));
}

/* Bytes 2, 1 and 0 of a word are the digits. */
INLINE __m512i digits_of(__m512 x, __m512 up) {
    const __m512i middle = _mm512_set1_epi32(0x808080);
    return _mm512_xor_si512(_mm512_add_epi32(_mm512_cvtps_epi32(x * up), middle), middle);
}

#define FOUR(F, n) F(n), F(n + 1), F(n + 2), F(n + 3)
#define SIXTEEN(F, n) FOUR(F, n), FOUR(F, n + 4), FOUR(F, n + 8), FOUR(F, n + 12)
#define BYTES_64(F) {SIXTEEN(F, 0), SIXTEEN(F, 16), SIXTEEN(F, 32), SIXTEEN(F, 48)}
/* Of two vectors of 16 words: 32 first digits, then 32 second ones; 32 third ones. */
#define IN_A_ROW(n) 4 * ((n) % 32) + 2 - (n) / 32
#define IN_A_ROW_LAST(n) 4 * ((n) % 32)
/* The same, with the digits of both vectors by turns. */
#define BY_TURNS(n) 4 * ((n) % 32 / 2) + 64 * ((n) % 2) + 2 - (n) / 32
#define BY_TURNS_LAST(n) 4 * ((n) % 32 / 2) + 64 * ((n) % 2)
/* Of two vectors of 32 pairs of bytes: the first 16 by turns; the last 16. */
#define PAIRS_BY_TURNS(n) (n) / 2 + 32 * ((n) % 2)
static const uint8_t in_a_row[64] __attribute__((aligned(64))) = BYTES_64(IN_A_ROW);
static const uint8_t in_a_row_last[64] __attribute__((aligned(64))) = BYTES_64(IN_A_ROW_LAST);
static const uint8_t by_turns[64] __attribute__((aligned(64))) = BYTES_64(BY_TURNS);
static const uint8_t by_turns_last[64] __attribute__((aligned(64))) = BYTES_64(BY_TURNS_LAST);
static const uint16_t pairs_by_turns[32] __attribute__((aligned(64))) = {SIXTEEN(PAIRS_BY_TURNS, 0),
                                                                          SIXTEEN(PAIRS_BY_TURNS, 16)};

/* 64 numbers of a row -> their first digits, their second and their third ones, `next` bytes after each other. */
INLINE void split_row(const __m512i *words, int8_t *out, int64_t next) {
    const __m512i index = _mm512_load_si512(in_a_row), last = _mm512_load_si512(in_a_row_last);
    __m512i left = _mm512_permutex2var_epi8(words[0], index, words[1]);
    __m512i right = _mm512_permutex2var_epi8(words[2], index, words[3]);
    _mm512_store_si512(out, _mm512_shuffle_i64x2(left, right, 0x44));
    _mm512_store_si512(out + next, _mm512_shuffle_i64x2(left, right, 0xee));
    left = _mm512_permutex2var_epi8(words[0], last, words[1]);
    right = _mm512_permutex2var_epi8(words[2], last, words[3]);
    _mm512_store_si512(out + 2 * next, _mm512_shuffle_i64x2(left, right, 0x44));
}

/* 4 rows of 16 columns -> for each digit the row of a B tile, with the four of a column side by side. */
INLINE void split_column(const __m512i *words, int8_t *out, int64_t next) {
    const __m512i index = _mm512_load_si512(by_turns), last = _mm512_load_si512(by_turns_last);
    const __m512i pairs = _mm512_load_si512(pairs_by_turns);
    const __m512i last_pairs = _mm512_add_epi16(pairs, _mm512_set1_epi16(16));
    __m512i first = _mm512_permutex2var_epi8(words[0], index, words[1]);
    __m512i second = _mm512_permutex2var_epi8(words[2], index, words[3]);
    _mm512_store_si512(out, _mm512_permutex2var_epi16(first, pairs, second));
    _mm512_store_si512(out + next, _mm512_permutex2var_epi16(first, last_pairs, second));
    first = _mm512_permutex2var_epi8(words[0], last, words[1]);
    second = _mm512_permutex2var_epi8(words[2], last, words[3]);
    _mm512_store_si512(out + 2 * next, _mm512_permutex2var_epi16(first, pairs, second));
}

INLINE void transpose_tile(int8_t *tile) {
    Rows r;
    for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512(tile + 64 * i);
    transpose(r);
    for (int i = 0; i < 16; i++) _mm512_store_si512(tile + 64 * i, r[i]);
}

/* (16 rows, D) of X as A tiles or, transposed, as the B tiles of X^T, `step` bytes after each other, digits `next`; the
   sum goes along D, the factors by rows. */
static void pack_along_rows(const float *features, int64_t rows, int64_t dim, int8_t *out, int64_t step, int64_t next,
                            int transposed, float *factors) {
    uint32_t largest[ROWS] = {};
    float up[ROWS];
    for (int64_t i = 0; i < MIN(rows, ROWS); i++) {
        __m512i most = _mm512_setzero_si512();
        for (int64_t column = 0; column < dim; column += 16)
            most = _mm512_max_epu32(
                most, magnitude(_mm512_maskz_loadu_ps(first_of(dim - column), features + i * dim + column)));
        largest[i] = _mm512_reduce_max_epu32(most);
    }
    scales_of(_mm512_loadu_si512(largest), up, factors);
    for (int64_t column = 0; column < dim; column += DEPTH, out += step) {
        for (int64_t i = 0; i < ROWS; i++) {
            __m512i words[4];
            for (int part = 0; part < 4; part++) {
                int64_t start = column + 16 * part;
                __mmask16 mask = i < rows ? first_of(dim - start) : 0;
                words[part] =
                    digits_of(_mm512_maskz_loadu_ps(mask, features + i * dim + start), _mm512_set1_ps(up[i]));
            }
            split_row(words, out + 64 * i, next);
        }
        if (transposed)
            for (int digit = 0; digit < DIGITS; digit++) transpose_tile(out + digit * next);
    }
}

/* 16 columns of (rows, D) of X as B tiles; the sum goes along rows, the factors by columns. */
static void pack_along_columns(const float *features, int64_t rows, int64_t columns, int64_t dim, int8_t *out,
                               float *factors) {
    float up[16];
    __mmask16 mask = first_of(columns);
    __m512i most = _mm512_setzero_si512();
    for (int64_t i = 0; i < rows; i++)
        most = _mm512_max_epu32(most, magnitude(_mm512_maskz_loadu_ps(mask, features + i * dim)));
    scales_of(most, up, factors);
    for (int64_t top = 0; top < rows; top += DEPTH, out += RIGHT_STEP)
        for (int64_t p = 0; p < 16; p++) {
            __m512i words[4];
            for (int64_t i = 0; i < 4; i++) {
                int64_t row = top + 4 * p + i;
                words[i] = digits_of(_mm512_maskz_loadu_ps(row < rows ? mask : 0, features + row * dim),
                                     _mm512_loadu_ps(up));
            }
            split_column(words, out + 64 * p, 2 * TILE);
        }
}

/* dz of a pair of panels lies by stripes of 16 texts, `stripe` numbers after each other, with 16 numbers an image. */

/* dz of 16 images as A tiles; the sum goes along texts. */
static void pack_dz(const float *dz, int64_t stripe, int64_t stripes, __m512i largest, int8_t *out, float *factors) {
    float up[ROWS];
    scales_of(largest, up, factors);
    for (int64_t first = 0; first < stripes; first += 4, out += LEFT_STEP)
        for (int64_t i = 0; i < ROWS; i++) {
            __m512i words[4];
            for (int64_t part = 0; part < 4; part++) {
                const float *from = dz + (first + part) * stripe + 16 * i;
                __m512 x = first + part < stripes ? _mm512_load_ps(from) : _mm512_setzero_ps();
                words[part] = digits_of(x, _mm512_set1_ps(up[i]));
            }
            split_row(words, out + 64 * i, TILE);
        }
}

/* dz of 16 texts, transposed, as A tiles; the sum goes along images. */
static void pack_dz_transposed(const float *dz, int64_t rows, __m512i largest, int8_t *out, float *factors) {
    float up[ROWS];
    scales_of(largest, up, factors);
    for (int64_t top = 0; top < rows; top += DEPTH, out += LEFT_STEP) {
        for (int64_t p = 0; p < 16; p++) {
            __m512i words[4];
            for (int64_t i = 0; i < 4; i++) {
                int64_t row = top + 4 * p + i;
                __m512 x = row < rows ? _mm512_load_ps(dz + 16 * row) : _mm512_setzero_ps();
                words[i] = digits_of(x, _mm512_loadu_ps(up));
            }
            split_column(words, out + 64 * p, TILE);
        }
        for (int digit = 0; digit < DIGITS; digit++) transpose_tile(out + digit * TILE);
    }
}

/* 16 images and 32 texts: sums of digits -> dz, and the largest of each image and text. A set bit j of excluded[i] is
   no pair of the loss. */
static void block_terms(const int32_t *products, const float *image_factors, const float *text_factors,
                        const uint32_t *excluded, float scale, float bias, Sums *sums, float *dz, int64_t stripe,
                        __m512i *largest_of_rows, uint32_t *largest_of_columns) {
    for (int half = 0; half < 2; half++, dz += stripe) {
        __m512 factors = _mm512_loadu_ps(text_factors + 16 * half);
        __m512i most = _mm512_setzero_si512();
        for (int i = 0; i < ROWS; i++) {
            __m512 x = combined(products + i * EDGE + 16 * half, factors * image_factors[i]);
            x = _mm512_mask_blend_ps(excluded[i] >> 16 * half, x, _mm512_set1_ps(-INFINITY));
            x = (__m512)terms((Floats)x, scale, bias, sums + i);
            _mm512_store_ps(dz + 16 * i, x);
            most = _mm512_max_epu32(most, magnitude(x));
            largest_of_rows[i] = _mm512_max_epu32(largest_of_rows[i], magnitude(x));
        }
        _mm512_storeu_si512(largest_of_columns + 16 * half, most);
    }
}

/* dz of a strip of images with a panel of texts, and their sums. Image i and text i + offset are a pair: their dz goes
   into pair_dz, and is 0 in its place. Returns the largest dz of each image. */
static __m512i strip_terms(const int8_t *images, const float *image_factors, int64_t rows, const int8_t *texts,
                           const float *text_factors, int64_t width, int64_t steps, float scale, float bias,
                           int64_t offset, float *sums, int64_t stride, float *dz, int64_t stripe,
                           uint32_t *largest_of_columns, float *pair_dz) {
    int32_t products[DIGITS * BLOCK] __attribute__((aligned(64)));
    Sums strip_sums[ROWS] = {};
    __m512i largest_of_rows[ROWS] = {};
    uint32_t excluded[ROWS], largest[ROWS];
    for (int64_t left = 0; left < width; left += EDGE) {
        int64_t columns = MIN(EDGE, width - left), shift = offset - left;
        int64_t first_pair = shift < 0 ? -shift : 0, last_pair = MIN(rows, columns - shift);
        multiply(images, texts + left / EDGE * steps * RIGHT_STEP, steps, products);
        for (int64_t i = 0; i < ROWS; i++) excluded[i] = i < rows ? (uint32_t)(~0ull << columns) : ~0u;
        for (int64_t i = first_pair; i < last_pair; i++) {
            int64_t j = i + shift;
            __m512 factors = _mm512_set1_ps(text_factors[left + j] * image_factors[i]);
            float cosine = combined(products + i * EDGE + j / 16 * 16, factors)[j % 16];
            pair_dz[i] = pair_terms(cosine, scale, bias, sums + i, stride);
            excluded[i] |= 1u << j;
        }
        block_terms(products, image_factors, text_factors + left, excluded, scale, bias, strip_sums,
                    dz + left / 16 * stripe, stripe, largest_of_rows, largest_of_columns + left);
    }
    for (int64_t i = 0; i < rows; i++) add_sums(strip_sums + i, sums + i, stride);
    for (int64_t i = 0; i < ROWS; i++) largest[i] = _mm512_reduce_max_epu32(largest_of_rows[i]);
    return _mm512_loadu_si512(largest);
}

/* 16 rows of a matrix, or less, += A . B for all its columns. All loads go before the stores: rows that lie a multiple
   of 4096 bytes apart would wait for each other. */
static void add_products(const int8_t *a, const float *row_factors, const int8_t *b, const float *column_factors,
                         int64_t steps, float *out, int64_t rows, int64_t dim, int overwrite) {
    int32_t products[DIGITS * BLOCK] __attribute__((aligned(64)));
    for (int64_t d = 0; d < dim; d += EDGE, b += steps * RIGHT_STEP) {
        prefetch_block(out + d, rows, dim);
        multiply(a, b, steps, products);
        for (int64_t half = d; half < MIN(dim, d + EDGE); half += 16) {
            __m512 factors = _mm512_loadu_ps(column_factors + half);
            __mmask16 mask = first_of(dim - half);
            __m512 sum[ROWS];
#pragma GCC unroll 16
            for (int64_t i = 0; i < ROWS; i++) {
                sum[i] = combined(products + i * EDGE + half - d, factors * row_factors[i]);
                if (!overwrite && i < rows) sum[i] += _mm512_maskz_loadu_ps(mask, out + i * dim + half);
            }
#pragma GCC unroll 16
            for (int64_t i = 0; i < ROWS; i++)
                if (i < rows) _mm512_mask_storeu_ps(out + i * dim + half, mask, sum[i]);
        }
    }
}

/* Rows of a matrix += their pairs' dz times the features of their partners. */
static void add_pairs(float *out, const float *pair_dz, const float *partners, int64_t pairs, int64_t dim) {
    for (int64_t i = 0; i < pairs; i++)
        for (int64_t d = 0; d < dim; d++) out[i * dim + d] += pair_dz[i] * partners[i * dim + d];
}

#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define CEIL(a, b) (((a) + (b)-1) / (b))

/* As block_bfloat16. */
int block_float32(const float *images, const float *texts, int64_t num_images, int64_t num_texts, int64_t dim,
                  float scale, float bias, int64_t offset, int64_t panel, float *sums, int64_t stride,
                  float *grad_images, int overwrite_images, float *grad_texts) {
    panel = MIN(panel, PANEL);
    int64_t most_images = MIN(panel, num_images), most_texts = MIN(panel, num_texts);
    int64_t dims = CEIL(dim, EDGE), dim_steps = CEIL(dim, DEPTH);
    int64_t across = CEIL(most_images, ROWS), along = CEIL(most_texts, EDGE), stripe = 16 * ROWS * across;
    int64_t most_image_steps = CEIL(most_images, DEPTH), most_text_steps = CEIL(most_texts, DEPTH);
    int64_t texts_size = along * dim_steps * RIGHT_STEP, all_texts_size = dims * most_text_steps * RIGHT_STEP;
    int64_t all_images_size = dims * most_image_steps * RIGHT_STEP, all_dz_size = across * most_text_steps * LEFT_STEP;
    int64_t own_size = MAX(dim_steps, most_image_steps) * LEFT_STEP, threads = omp_get_max_threads();
    int64_t factors = along * EDGE + 2 * dims * EDGE + 2 * across * ROWS, largest = across * along * EDGE;
    int64_t size = texts_size + all_texts_size + all_images_size + all_dz_size + threads * own_size;
    int8_t *memory = aligned_alloc(64, size + 4 * (2 * along * stripe + factors + largest));
    if (!memory) return -1;
    int8_t *texts_by_dim = memory, *texts_by_text = texts_by_dim + texts_size;
    int8_t *images_by_image = texts_by_text + all_texts_size, *dz_by_text = images_by_image + all_images_size;
    int8_t *all_own = dz_by_text + all_dz_size;
    float *dz = (float *)(all_own + threads * own_size), *text_factors = dz + 2 * along * stripe;
    float *text_dim_factors = text_factors + along * EDGE, *image_dim_factors = text_dim_factors + dims * EDGE;
    float *dz_factors = image_dim_factors + dims * EDGE, *pair_dz = dz_factors + across * ROWS;
    uint32_t *largest_of_columns = (uint32_t *)(pair_dz + across * ROWS);
#pragma omp parallel
    {
        int8_t *own = all_own + omp_get_thread_num() * own_size;
        configure_tiles();
        for (int64_t top = 0; top < num_images; top += most_images) {
            const float *panel_images = images + top * dim;
            int64_t height = MIN(most_images, num_images - top), strips = CEIL(height, ROWS);
            int64_t image_steps = CEIL(height, DEPTH);
#pragma omp for schedule(static)
            for (int64_t d = 0; d < 2 * dims; d++)
                pack_along_columns(panel_images + 16 * d, height, dim - 16 * d, dim,
                                   images_by_image + d / 2 * image_steps * RIGHT_STEP + d % 2 * TILE,
                                   image_dim_factors + 16 * d);
            for (int64_t left = 0; left < num_texts; left += most_texts) {
                const float *panel_texts = texts + left * dim;
                int64_t width = MIN(most_texts, num_texts - left), stripes = CEIL(width, 16);
                int64_t text_steps = CEIL(width, DEPTH), shift = top + offset - left;
#pragma omp for schedule(static) nowait
                for (int64_t g = 0; g < 2 * CEIL(width, EDGE); g++)
                    pack_along_rows(panel_texts + 16 * g * dim, width - 16 * g, dim,
                                    texts_by_dim + g / 2 * dim_steps * RIGHT_STEP + g % 2 * TILE, RIGHT_STEP, 2 * TILE,
                                    1, text_factors + 16 * g);
#pragma omp for schedule(static)
                for (int64_t d = 0; d < 2 * dims; d++)
                    pack_along_columns(panel_texts + 16 * d, width, dim - 16 * d, dim,
                                       texts_by_text + d / 2 * text_steps * RIGHT_STEP + d % 2 * TILE,
                                       text_dim_factors + 16 * d);
#pragma omp for schedule(static)
                for (int64_t s = 0; s < strips; s++) {
                    int64_t first = ROWS * s, rows = height - first;
                    float image_factors[ROWS];
                    pack_along_rows(panel_images + first * dim, rows, dim, own, LEFT_STEP, TILE, 0, image_factors);
                    __m512i largest_of_rows = strip_terms(
                        own, image_factors, MIN(rows, ROWS), texts_by_dim, text_factors, width, dim_steps, scale, bias,
                        first + shift, sums + top + first, stride, dz + 16 * first, stripe,
                        largest_of_columns + s * along * EDGE, pair_dz + first);
                    pack_dz(dz + 16 * first, stripe, stripes, largest_of_rows,
                            dz_by_text + s * text_steps * LEFT_STEP, dz_factors + first);
                }
#pragma omp for schedule(static) nowait
                for (int64_t s = 0; s < strips; s++) {
                    int64_t first = ROWS * s, rows = MIN(ROWS, height - first);
                    int64_t pair = MAX(first, -shift), end = MIN(first + rows, width - shift);
                    add_products(dz_by_text + s * text_steps * LEFT_STEP, dz_factors + first, texts_by_text,
                                 text_dim_factors, text_steps, grad_images + (top + first) * dim, rows, dim,
                                 overwrite_images && left == 0);
                    add_pairs(grad_images + (top + pair) * dim, pair_dz + pair, panel_texts + (pair + shift) * dim,
                              end - pair, dim);
                }
#pragma omp for schedule(static)
                for (int64_t g = 0; g < stripes; g++) {
                    int64_t first = ROWS * g, rows = MIN(ROWS, width - first);
                    int64_t pair = MAX(first, shift), end = MIN(first + rows, height + shift);
                    float column_factors[ROWS];
                    __m512i most = _mm512_setzero_si512();
                    for (int64_t s = 0; s < strips; s++)
                        most = _mm512_max_epu32(
                            most, _mm512_loadu_si512(largest_of_columns + s * along * EDGE + first));
                    pack_dz_transposed(dz + g * stripe, ROWS * strips, most, own, column_factors);
                    add_products(own, column_factors, images_by_image, image_dim_factors, image_steps,
                                 grad_texts + (left + first) * dim, rows, dim, top == 0);
                    add_pairs(grad_texts + (left + pair) * dim, pair_dz + pair - shift,
                              panel_images + (pair - shift) * dim, end - pair, dim);
                }
            }
        }
        _tile_release();
    }
    free(memory);
    return 0;
}
#endif
