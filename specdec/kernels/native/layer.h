/* A decoder layer in two calls, with the cache update between them: norm, q/k/v and rotation; then attention, output
 * product, norm and MLP. Also single products. All of it for one instruction set: avx2.c, avx512.c and amx.c include
 * this file after one of simd_*.h. */

#include "rows.h"

#include "product.h"

#include "gguf.h"

#include "attention.h"

#include "draws.h"


/* ---- products over the pool ---- */

typedef struct {
    Product products[3];
    int64_t ends[3]; /* running number of strips */
    int count;
    int64_t strips_per_chunk;
    int gated; /* products 0 and 1 are gate and up: leave silu(gate) * up in 0 */
} Products;

TARGET static void product_chunk(void *context, int chunk) {
    const Products *all = context;
    int64_t strip = chunk * all->strips_per_chunk, begin = 0;
    const int64_t last = strip + all->strips_per_chunk;
    for (int i = 0; i < all->count && strip < last; begin = all->ends[i++]) {
        const int64_t stop = all->ends[i] < last ? all->ends[i] : last;
        if (stop <= strip) continue;
        const Product *p = &all->products[i];
        const int64_t n = (strip - begin) * STRIP,
                      end = (stop - begin) * STRIP < p->matrix->n ? (stop - begin) * STRIP : p->matrix->n;
        outputs(p, n, end);
        if (all->gated) {
            const Product *up = &all->products[1];
            outputs(up, n, end);
            for (int64_t row = 0; row < p->rows; row++)
                silu_times(p->out + row * p->matrix->n + n, up->out + row * p->matrix->n + n, end - n);
            return;
        }
        strip = stop;
    }
}

/* Runs up to three products of the same rows as one job. */
static void multiply(Products *all) {
    int64_t strips = 0, bytes = 0;
    for (int i = 0; i < all->count; i++) {
        const Matrix *w = all->products[i].matrix;
        if (!(all->gated && i)) strips += (w->n + STRIP - 1) / STRIP;
        all->ends[i] = strips;
        bytes += w->n * w->k * w->bits / 8;
    }
    int64_t chunks = bytes / CHUNK_BYTES, least = 4 * num_active_threads();
    chunks = chunks < least ? least : chunks > 4096 ? 4096 : chunks;
    all->strips_per_chunk = (strips + chunks - 1) / chunks;
    parallel_for(product_chunk, all, (strips + all->strips_per_chunk - 1) / all->strips_per_chunk);
}

/* ---- packing of weights ---- */

typedef struct {
    const float *w;
    int64_t n, k, bits;
    int8_t *packed;
    float *scale;
} Packing;

TARGET static void pack_strip(void *context, int strip) {
    const Packing *p = context;
    const int64_t first = (int64_t)strip * STRIP;
    const int64_t block_bytes = (p->k + GROUP - 1) / GROUP * group_bytes(p->bits);
    memset(p->packed + first / 16 * block_bytes, 0, (size_t)(STRIP / 16 * block_bytes));
    for (int64_t n = first; n < p->n && n < first + STRIP; n++) {
        const float *w = p->w + n * p->k;
        int8_t *block = p->packed + n / 16 * block_bytes;
        if (p->bits == 8)
            p->scale[n] = pack_row(w, p->k, block + n % 16 * 4);
        else
            pack_row4(w, p->k, block, (int)(n % 16));
    }
}

static void pack(const float *w, int64_t n, int64_t k, int64_t bits, int8_t *packed, float *scale) {
    Packing p = {w, n, k, bits, packed, scale};
    parallel_for(pack_strip, &p, (int)((n + STRIP - 1) / STRIP));
}

/* ---- rows: optional norm, then quantisation where the next product's weights are packed ---- */

typedef struct {
    const float *x, *weight; /* weight NULL: no norm */
    float eps;
    int64_t rows, k;
    float *normed;        /* NULL when there is no norm */
    Quantized *quantized; /* NULL when the next product takes float32 */
} Rows;

/* Rows that one thread works on: those of a tile lie in the same cache lines, for which two threads would wait in turn. */
#define NUM_TILES(rows) ((int)(((rows) + WIDE_TILE - 1) / WIDE_TILE))
#define EACH_ROW(row, tile, rows) \
    for (int64_t row = (int64_t)(tile) * WIDE_TILE; row < (rows) && row < ((int64_t)(tile) + 1) * WIDE_TILE; row++)

TARGET static void rows_chunk(void *context, int tile) {
    const Rows *r = context;
    EACH_ROW(row, tile, r->rows) {
        const float *x = r->x + row * r->k;
        if (r->weight) {
            rms_norm(x, r->weight, r->eps, r->k, r->normed + row * r->k);
            x = r->normed + row * r->k;
        }
        if (r->quantized) quantize_one(r->quantized, x, row);
    }
}

/* Gets rows ready for products with matrices like `w`; returns the rows that a float32 product reads. */
static const float *ready_rows(const Matrix *w, const float *x, const float *norm, float eps, int64_t rows,
                               Quantized *quantized) {
    Rows r = {x, norm, eps, rows, w->k, norm ? take((size_t)(rows * w->k) * sizeof(float)) : NULL, NULL};
    if (w->bits < 16) {
        quantized->rows = rows;
        quantized->tile = tile_of(w, rows);
        quantized->k = w->k;
        quantized->scales_per_group = w->bits == 8 ? 1 : 2;
        quantized->groups = (w->k + GROUP - 1) / GROUP;
        const int64_t room = quantized->tile == TILE ? rows : (rows + WIDE_TILE - 1) / WIDE_TILE * WIDE_TILE;
        quantized->q = take((size_t)(room * quantized->groups * GROUP));
        quantized->scales = take((size_t)(quantized->scales_per_group * room * quantized->groups) * sizeof(float));
        quantized->totals = take((size_t)(room * quantized->groups) * sizeof(int32_t));
        quantized->shares = take((size_t)(2 * room * quantized->groups) * sizeof(float));
        quantized->quarters = take((size_t)(4 * room * quantized->groups) * sizeof(int32_t));
        if (room > rows) memset(quantized->scales, 0, (size_t)(room * quantized->groups) * sizeof(float));
        r.quantized = quantized;
    }
    if (norm || w->bits < 16) parallel_for(rows_chunk, &r, NUM_TILES(rows));
    return norm ? r.normed : x;
}

/* `weight_only`: the weights are packed, and the rows stay float32. */
static void linear(const Matrix *w, const float *x, int64_t rows, int weight_only, float *out) {
    Quantized quantized;
    Products all = {.count = 1};
    if (weight_only) {
        all.products[0] = (Product){w, x, NULL, rows, out, NULL};
        multiply(&all);
        return;
    }
    const float *ready = ready_rows(w, x, NULL, 0, rows, &quantized);
    all.products[0] = (Product){w, ready, &quantized, rows, out, NULL};
    multiply(&all);
}

/* ---- the two halves of a layer ---- */

typedef struct {
    const Layer *layer;
    const float *cos, *sin;
    int64_t rows;
    float *q, *k;
} Rotation;

TARGET static void rotate_chunk(void *context, int tile) {
    const Rotation *r = context;
    const Layer *l = r->layer;
    EACH_ROW(row, tile, r->rows)
    for (int64_t h = 0; h < l->num_heads + l->num_kv_heads; h++) {
        const int is_query = h < l->num_heads;
        float *head = is_query ? r->q + (row * l->num_heads + h) * l->head_dim
                               : r->k + (row * l->num_kv_heads + h - l->num_heads) * l->head_dim;
        const float *norm = is_query ? l->q_norm : l->k_norm;
        if (norm) rms_norm(head, norm, l->head_eps, l->head_dim, head);
        if (r->cos) rotate(head, r->cos + row * l->head_dim, r->sin + row * l->head_dim, l->head_dim);
    }
}

static void attention_inputs(const Layer *l, const float *x, int64_t rows, const float *cos, const float *sin, float *q,
                             float *k, float *v) {
    Quantized quantized;
    Products all = {.count = 3};
    const float *ready = ready_rows(&l->q, x, l->input_norm, l->input_eps, rows, &quantized);
    all.products[0] = (Product){&l->q, ready, &quantized, rows, q, NULL};
    all.products[1] = (Product){&l->k, ready, &quantized, rows, k, NULL};
    all.products[2] = (Product){&l->v, ready, &quantized, rows, v, NULL};
    multiply(&all);
    Rotation r = {l, cos, sin, rows, q, k};
    parallel_for(rotate_chunk, &r, NUM_TILES(rows));
}

/* What comes after attention. mixed: [rows][heads][head_dim]; x: what came into the layer. */
static void finish_layer(const Layer *l, int64_t rows, const float *mixed, const float *x, float *out) {
    float *hidden = take((size_t)(rows * l->o.n) * sizeof(float));
    float *gate = take((size_t)(rows * l->gate.n) * sizeof(float));
    float *up = take((size_t)(rows * l->gate.n) * sizeof(float));
    Quantized quantized;

    const float *ready = ready_rows(&l->o, mixed, NULL, 0, rows, &quantized);
    Products output = {.count = 1, .products = {{&l->o, ready, &quantized, rows, hidden, x}}};
    multiply(&output);

    ready = ready_rows(&l->gate, hidden, l->post_norm, l->post_eps, rows, &quantized);
    Products gated = {.count = 2, .gated = 1};
    gated.products[0] = (Product){&l->gate, ready, &quantized, rows, gate, NULL};
    gated.products[1] = (Product){&l->up, ready, &quantized, rows, up, NULL};
    multiply(&gated);

    ready = ready_rows(&l->down, gate, NULL, 0, rows, &quantized);
    Products down = {.count = 1, .products = {{&l->down, ready, &quantized, rows, out, hidden}}};
    multiply(&down);
}

static void attention_and_mlp(const Layer *l, Attention *a, const float *x, float *out) {
    a->out = take((size_t)(a->B * a->T * l->o.k) * sizeof(float));
    attend(a);
    finish_layer(l, a->B * a->T, a->out, x, out);
}

/* A layer for the tokens of several texts: what each attends to is its own, all else is done for all at once. */
static void packed_layer(const PackedForward *f, int64_t layer, const float *x, float *out) {
    const Layer *l = f->layers + layer;
    const int64_t K = l->num_kv_heads, D = l->head_dim, size = K * PAGE_SLOTS * D;
    const size_t k_offset = (size_t)(2 * layer * size) * sizeof(float), v_offset = k_offset + (size_t)size * sizeof(float);
    attention_inputs(l, x, f->rows, f->cos, f->sin, f->q, f->k, f->v);
    for (int64_t row = 0; row < f->rows; row++)
        for (int64_t head = 0; head < K; head++) {
            const int64_t source = (row * K + head) * D;
            memcpy((float *)(f->places[row] + k_offset) + head * PAGE_SLOTS * D, f->k + source, (size_t)D * sizeof(float));
            memcpy((float *)(f->places[row] + v_offset) + head * PAGE_SLOTS * D, f->v + source, (size_t)D * sizeof(float));
        }
    float *mixed = take((size_t)(f->rows * l->o.k) * sizeof(float));
    int64_t first = 0;
    for (int64_t i = 0; i < f->count; first += f->attentions[i++].T * l->o.k) {
        Attention *a = f->attentions + i;
        a->q = f->q + first, a->out = mixed + first;
        a->k = (const float *)k_offset, a->v = (const float *)v_offset;
    }
    attend_all(f->attentions, f->count);
    finish_layer(l, f->rows, mixed, x, out);
}

/* A layer for the tokens of a cache's rows. */
static void stack_layer(const StackForward *f, int64_t layer, const float *x, float *out) {
    const Layer *l = f->layers + layer;
    Attention *a = f->attention;
    float *q = f->q + layer * f->q_apart;
    attention_inputs(l, x, a->B * a->T, f->cos, f->sin, q, f->k, f->v);
    for (int64_t b = 0; b < a->B; b++)
        for (int64_t t = 0; t < a->T; t++)
            for (int64_t head = 0; head < a->K; head++) {
                const int64_t source = ((b * a->T + t) * a->K + head) * a->D, slot = f->firsts[b] + t;
                const size_t bytes = (size_t)a->D * sizeof(float);
                memcpy(f->keys[layer] + b * a->k_strides[0] + head * a->k_strides[1] + slot * a->k_strides[2],
                       f->k + source, bytes);
                memcpy(f->values[layer] + b * a->v_strides[0] + head * a->v_strides[1] + slot * a->v_strides[2],
                       f->v + source, bytes);
            }
    a->q = q, a->k = f->keys[layer], a->v = f->values[layer];
    attention_and_mlp(l, a, x, out);
}

/* ---- what a draft head has around its layers ---- */

static void head_inputs(const HeadForward *f) {
    const StackForward *s = &f->layers;
    const int64_t rows = s->attention->B * s->attention->T, D = s->attention->D, channels = f->first.n,
                  state_size = f->first.k - channels;
    float *inputs = take((size_t)(rows * f->first.k) * sizeof(float));
    for (int64_t row = 0; row < rows; row++) {
        const int64_t token = f->tokens[row] < f->num_embeddings ? f->tokens[row] : f->num_embeddings - 1;
        float *input = inputs + row * f->first.k;
        memcpy(input, f->embeddings + token * channels, (size_t)channels * sizeof(float));
        memcpy(input + channels, f->states + row * state_size, (size_t)state_size * sizeof(float));
        memcpy((float *)s->cos + row * D, f->cos + f->positions[row] * D, (size_t)D * sizeof(float));
        memcpy((float *)s->sin + row * D, f->sin + f->positions[row] * D, (size_t)D * sizeof(float));
    }
    linear(&f->first, inputs, rows, 0, (float *)s->x);
}

static void head_logits(const HeadLogits *f) {
    float *hidden = take((size_t)(f->rows * f->last.n) * sizeof(float));
    linear(&f->last, f->x, f->rows, 0, hidden);
    Quantized quantized;
    const float *ready = ready_rows(&f->lm_head, hidden, f->norm, f->eps, f->rows, &quantized);
    Products all = {.count = 1, .products = {{&f->lm_head, ready, &quantized, f->rows, f->logits, NULL}}};
    multiply(&all);
}

const Kernels KERNELS = {INSTRUCTION_SET, pack, repack, linear, attend, attention_inputs, attention_and_mlp,
                         packed_layer, stack_layer, head_inputs, head_logits, take_from, verify};
