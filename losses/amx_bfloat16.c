/* A whole block of the sigmoid loss on bfloat16 features, for processors with AMX, Intel's matrix unit: what
   losses/sigmoid.py does tile by tile with a matrix library, here without a tile of logits ever leaving the caches.

   Images go by panels and, for each of them, texts by panels. Three walks over a pair of panels, each shared by all
   threads:

       32 images x 32 texts: cosines -> terms -> dz, while the matrix unit multiplies the next 32 x 32
       32 images x 32 dimensions: image gradients += dz . texts
       32 texts x 32 dimensions: text gradients += dz^T . images

   Every number is summed in float32, by one thread, in a fixed order: how many threads there are does not matter.

   The unit takes A, 16 rows of 32, and B, 32 rows of 16 that are stored as 16 rows of 16 pairs (2p, 2p + 1) of a
   column. All operands are packed as such tiles of 1 KiB, one after another along the sum, padded with zeros to
   multiples of 32. Both forms of a matrix and of its transpose come from its rows by two steps: `interleave` (rows 2p
   and 2p + 1 become pairs) and the transposition of 16 x 16 words of 32 bits, which makes B tiles of X^T of A tiles of
   X and back. */
#include "amx.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

#define TILE 512   /* bfloat16 numbers in a tile */
#define PANEL 1024 /* the most that pays: what is read again and again fits into a second cache of 2 MiB */

_Static_assert(2 * PANEL / EDGE <= MAX_TERMS, "a strip's sums are folded at its end");

/* Whether the kernel lets this process use the unit, which it must be asked for. */
int amx_is_there(void) { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0; }

/* 32 rows of a left factor or 32 columns of a right one: two sequences of tiles, `half` elements apart. */
typedef struct {
    uint16_t *tiles;
    int64_t half;
} Operand;

static Operand moved(Operand operand, int64_t elements) {
    operand.tiles += elements;
    return operand;
}

static inline void product_begin(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

/* A quarter of step k of the sum. What streams by is loaded past the first cache, where the other factor stays for the
   next product. */
INLINE void product_quarter(Operand a, Operand b, int64_t k, int quarter, int left_streams) {
    const uint16_t *left = a.tiles + k * TILE, *right = b.tiles + k * TILE;
    switch (quarter) {
    case 0:
        if (left_streams) {
            _tile_stream_loadd(4, left, 64);
            _tile_stream_loadd(5, left + a.half, 64);
            _tile_loadd(6, right, 64);
            _tile_loadd(7, right + b.half, 64);
        } else {
            _tile_loadd(4, left, 64);
            _tile_loadd(5, left + a.half, 64);
            _tile_stream_loadd(6, right, 64);
            _tile_stream_loadd(7, right + b.half, 64);
        }
        _tile_dpbf16ps(0, 4, 6);
        break;
    case 1:
        _tile_dpbf16ps(1, 4, 7);
        break;
    case 2:
        _tile_dpbf16ps(2, 5, 6);
        break;
    case 3:
        _tile_dpbf16ps(3, 5, 7);
    }
}

INLINE void product_step(Operand a, Operand b, int64_t k, int left_streams) {
    for (int quarter = 0; quarter < 4; quarter++) product_quarter(a, b, k, quarter, left_streams);
}

static inline void product_end(float *out) {
    _tile_stored(0, out, 128);
    _tile_stored(1, out + 16, 128);
    _tile_stored(2, out + 16 * EDGE, 128);
    _tile_stored(3, out + 16 * EDGE + 16, 128);
}

/* (a_0, b_0, a_1, b_1, ..): the first 16 columns of the rows a and b as one row of a B tile, then the last 16. */
INLINE void interleave(__m512i a, __m512i b, __m512i *first, __m512i *last) {
    const __m512i columns = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i both = _mm512_or_si512(columns, _mm512_slli_epi32(columns, 16));
    const __m512i index = _mm512_or_si512(both, _mm512_set1_epi32(32 << 16)); /* from 32 on: of b */
    *first = _mm512_permutex2var_epi16(a, index, b);
    *last = _mm512_permutex2var_epi16(a, _mm512_add_epi32(index, _mm512_set1_epi32(0x00100010)), b);
}

/* 32 columns of 16 rows, with zeros where the matrix ends. */
INLINE void load_rows(__m512i *r, const uint16_t *features, int64_t rows, int64_t columns, int64_t stride) {
    __mmask32 mask = columns >= 32 ? ~0u : (1u << columns) - 1;
    for (int i = 0; i < 16; i++)
        r[i] = i < rows ? _mm512_maskz_loadu_epi16(mask, features + i * stride) : _mm512_setzero_si512();
}

INLINE void store_tile(uint16_t *out, const __m512i *r) {
    for (int i = 0; i < 16; i++) _mm512_store_si512(out + 32 * i, r[i]);
}

/* (32 rows, D) of X as A tiles or, transposed, as the B tiles of X^T; the sum goes along D. */
INLINE void pack_along_rows(const uint16_t *features, int64_t rows, int64_t dim, Operand out, int transposed) {
    for (int half = 0; half < 2; half++)
        for (int64_t column = 0; column < dim; column += 32) {
            Rows r;
            load_rows(r, features + 16 * half * dim + column, rows - 16 * half, dim - column, dim);
            if (transposed) transpose(r);
            store_tile(out.tiles + half * out.half + column / 32 * TILE, r);
        }
}

/* (32 rows, D) of X as B tiles or, transposed, as the A tiles of X^T: one for 16 columns; the sum goes along rows. */
INLINE void pack_along_columns(const uint16_t *features, int64_t rows, int64_t dim, Operand out, int transposed) {
    for (int64_t column = 0; column < dim; column += 32) {
        __m512i r[32];
        Rows left, right;
        load_rows(r, features + column, rows, dim - column, dim);
        load_rows(r + 16, features + 16 * dim + column, rows - 16, dim - column, dim);
        for (int p = 0; p < 16; p++) interleave(r[2 * p], r[2 * p + 1], left + p, right + p);
        if (transposed) transpose(left), transpose(right);
        uint16_t *to = out.tiles + column / 16 * out.half;
        store_tile(to, left);
        store_tile(to + out.half, right);
    }
}

/* 32 x 32 numbers into a matrix of rows x columns that may end before. Loads go some rows ahead of stores: rows that
   lie a multiple of 4096 bytes apart would wait for each other. */
static void add_block(const float *block, float *out, int64_t rows, int64_t columns, int64_t stride, int overwrite) {
    enum { AHEAD = 8 };
    for (int half = 0; half < 2; half++) {
        __mmask16 mask = first_of(columns - 16 * half);
        for (int64_t top = 0; top < MIN(rows, EDGE); top += AHEAD) {
            __m512 sum[AHEAD];
            for (int64_t i = 0; i < AHEAD; i++) {
                sum[i] = _mm512_load_ps(block + (top + i) * EDGE + 16 * half);
                if (!overwrite && top + i < rows)
                    sum[i] += _mm512_maskz_loadu_ps(mask, out + (top + i) * stride + 16 * half);
            }
            for (int64_t i = 0; i < AHEAD; i++)
                if (top + i < rows) _mm512_mask_storeu_ps(out + (top + i) * stride + 16 * half, mask, sum[i]);
        }
    }
}

static void transpose_block(float *block) {
    Rows r[4];
    for (int part = 0; part < 4; part++) {
        const float *from = block + (part >> 1) * 16 * EDGE + (part & 1) * 16;
        for (int i = 0; i < 16; i++) r[part][i] = _mm512_load_si512(from + i * EDGE);
        transpose(r[part]);
    }
    for (int part = 0; part < 4; part++) {
        float *to = block + (part & 1) * 16 * EDGE + (part >> 1) * 16;
        for (int i = 0; i < 16; i++) _mm512_store_si512(to + i * EDGE, r[part][i]);
    }
}

/* out, 32 x 32 or less of a matrix, += A . B over so many tiles or, where the left factor streams by, its transpose. */
INLINE void add_product(Operand a, Operand b, int64_t steps, int left_streams, float *out, int64_t rows,
                        int64_t columns, int64_t stride, int overwrite) {
    float block[EDGE * EDGE] __attribute__((aligned(64)));
    prefetch_block(out, rows, stride);
    product_begin();
    for (int64_t k = 0; k < steps; k++) product_step(a, b, k, left_streams);
    product_end(block);
    if (left_streams) transpose_block(block);
    add_block(block, out, rows, columns, stride, overwrite);
}

/* Cosines of 32 images and 32 texts -> dz as A tiles and as B tiles. The product of the next ones goes on between: it
   takes the matrix unit, this the vector units. */
INLINE void block_terms(const float *x, float scale, float bias, Sums *sums, Operand a, Operand b, Operand next_images,
                        Operand next_texts, int64_t next_steps) {
    int64_t quarters = 0, due = 0;
    for (int p = 0; p < 16; p++) {
        __m512i rows[2], left, right;
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            __m512 dz[2];
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                for (due += next_steps; 16 * quarters < due; quarters++)
                    product_quarter(next_images, next_texts, quarters / 4, quarters % 4, 0);
                const float *from = x + (2 * p + i) * EDGE + 16 * half;
                dz[half] = (__m512)terms((Floats)_mm512_load_ps(from), scale, bias, sums + 2 * p + i);
            }
            rows[i] = (__m512i)_mm512_cvtne2ps_pbh(dz[1], dz[0]);
            _mm512_store_si512(a.tiles + p / 8 * a.half + (2 * p + i) % 16 * 32, rows[i]);
        }
        interleave(rows[0], rows[1], &left, &right);
        _mm512_store_si512(b.tiles + 32 * p, left);
        _mm512_store_si512(b.tiles + b.half + 32 * p, right);
    }
}

/* dz of image i and text j of 32 and 32 */
static void set_dz(float dz, Operand a, Operand b, int64_t i, int64_t j) {
    uint16_t rounded = narrow_one(dz);
    a.tiles[i / 16 * a.half + i % 16 * 32 + j] = rounded;
    b.tiles[j / 16 * b.half + i / 2 * 32 + j % 16 * 2 + i % 2] = rounded;
}

/* dz of a strip of images with a panel of texts, and their sums.

   images: (rows <= 32, D) as A tiles; texts: (width, D) as B tiles, 32 of them after 32. Image i and text i + offset
   are a pair. a: where dz goes as A tiles; b: as B tiles, those of the next 32 texts are `b_step` elements on. */
static void strip_terms(Operand images, int64_t rows, Operand texts, int64_t width, int64_t steps, float scale,
                        float bias, int64_t offset, float *sums, int64_t stride, Operand a, Operand b, int64_t b_step) {
    float x[EDGE * EDGE] __attribute__((aligned(64))), cosines[EDGE];
    Sums strip_sums[EDGE] = {};
    product_begin();
    for (int64_t k = 0; k < steps; k++) product_step(images, texts, k, 0);
    for (int64_t left = 0; left < width; left += EDGE) {
        int64_t columns = MIN(EDGE, width - left), shift = offset - left;
        int64_t first_pair = shift < 0 ? -shift : 0, last_pair = MIN(rows, columns - shift);
        product_end(x);
        product_begin();
        texts = moved(texts, 2 * steps * TILE);
        if (columns < EDGE || rows < EDGE)
            for (int64_t i = 0; i < EDGE * EDGE; i++)
                if (i / EDGE >= rows || i % EDGE >= columns) x[i] = -INFINITY;
        for (int64_t i = first_pair; i < last_pair; i++) {
            cosines[i] = x[i * EDGE + i + shift];
            x[i * EDGE + i + shift] = -INFINITY;
        }
        block_terms(x, scale, bias, strip_sums, a, b, images, texts, left + EDGE < width ? steps : 0);
        for (int64_t i = first_pair; i < last_pair; i++)
            set_dz(pair_terms(cosines[i], scale, bias, sums + i, stride), a, b, i, i + shift);
        a = moved(a, TILE), b = moved(b, b_step);
    }
    for (int64_t i = 0; i < rows; i++) add_sums(strip_sums + i, sums + i, stride);
}

/* Loss and gradients of a block.

   images (B, D), texts (M, D): contiguous. Image i and text i + offset are a pair. panel: of images and of texts, PANEL
   at the most. grad_images (B, D), grad_texts (M, D): float32, contiguous; dz times features, without the scale, is
   added to the former or, where told to, put in its place, and in that of the latter always. sums (3, B): the loss and
   its gradients by bias and scale are added. Returns 0, or -1 where memory is missing. */
int block_bfloat16(const uint16_t *images, const uint16_t *texts, int64_t num_images, int64_t num_texts, int64_t dim,
                   float scale, float bias, int64_t offset, int64_t panel, float *sums, int64_t stride,
                   float *grad_images, int overwrite_images, float *grad_texts) {
    panel = MIN(panel, PANEL);
    int64_t steps = (dim + 31) / 32, strip = 2 * steps * TILE; /* along D, and 32 rows of features with it */
    int64_t across = (MIN(panel, num_images) + 31) / 32, along = (MIN(panel, num_texts) + 31) / 32;
    int64_t images_size = across * strip, texts_size = along * strip, dz_size = across * along * 2 * TILE;
    uint16_t *memory = aligned_alloc(
        64, 2 * (images_size + 2 * texts_size + 2 * dz_size + omp_get_max_threads() * strip));
    if (!memory) return -1;
    /* B tiles of texts^T, B tiles of texts, A tiles of images^T, and dz as both. */
    uint16_t *texts_by_dim = memory, *texts_by_text = texts_by_dim + texts_size;
    uint16_t *images_by_image = texts_by_text + texts_size, *dz_a = images_by_image + images_size;
    uint16_t *dz_b = dz_a + dz_size, *images_by_dim = dz_b + dz_size;
#pragma omp parallel
    {
        Operand images_strip = {images_by_dim + omp_get_thread_num() * strip, steps * TILE};
        configure_tiles();
        for (int64_t top = 0; top < num_images; top += panel) {
            int64_t height = MIN(panel, num_images - top), strips = (height + 31) / 32;
            Operand all_images = {images_by_image, strips * TILE};
#pragma omp for schedule(static)
            for (int64_t s = 0; s < strips; s++)
                pack_along_columns(images + (top + 32 * s) * dim, height - 32 * s, dim, moved(all_images, s * TILE), 1);
            for (int64_t left = 0; left < num_texts; left += panel) {
                int64_t width = MIN(panel, num_texts - left), groups = (width + 31) / 32;
                Operand all_texts = {texts_by_text, groups * TILE};
                Operand texts_strips = {texts_by_dim, steps * TILE};
                Operand dz_rows = {dz_a, groups * TILE}, dz_columns = {dz_b, strips * TILE};
#pragma omp for schedule(static)
                for (int64_t g = 0; g < groups; g++) {
                    const uint16_t *from = texts + (left + 32 * g) * dim;
                    pack_along_rows(from, width - 32 * g, dim, moved(texts_strips, g * strip), 1);
                    pack_along_columns(from, width - 32 * g, dim, moved(all_texts, g * TILE), 0);
                }
#pragma omp for schedule(static)
                for (int64_t s = 0; s < strips; s++) {
                    int64_t first = top + 32 * s, rows = MIN(32, height - 32 * s);
                    pack_along_rows(images + first * dim, rows, dim, images_strip, 0);
                    strip_terms(images_strip, rows, texts_strips, width, steps, scale, bias, first + offset - left,
                                sums + first, stride, moved(dz_rows, 2 * s * groups * TILE),
                                moved(dz_columns, s * TILE), 2 * strips * TILE);
                }
#pragma omp for schedule(static) nowait
                for (int64_t s = 0; s < strips; s++)
                    for (int64_t d = 0; d < steps; d++) {
                        Operand dz = moved(dz_rows, 2 * s * groups * TILE);
                        Operand features = moved(all_texts, 2 * d * groups * TILE);
                        add_product(dz, features, groups, 0, grad_images + (top + 32 * s) * dim + 32 * d,
                                    height - 32 * s, dim - 32 * d, dim, overwrite_images && left == 0);
                    }
#pragma omp for schedule(static)
                for (int64_t g = 0; g < groups; g++)
                    for (int64_t d = 0; d < steps; d++) {
                        Operand dz = moved(dz_columns, 2 * g * strips * TILE);
                        Operand features = moved(all_images, 2 * d * strips * TILE);
                        add_product(features, dz, strips, 1, grad_texts + (left + 32 * g) * dim + 32 * d,
                                    width - 32 * g, dim - 32 * d, dim, top == 0);
                    }
            }
        }
        _tile_release();
    }
    free(memory);
    return 0;
}
#endif
