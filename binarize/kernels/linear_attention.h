/* Linear attention, part of path.h: out = phi(q)^T S / (phi(q) . z + eps), S = sum phi(k) v^T and z = sum phi(k) over the
 * tokens of one image, phi(u) = e^min(u, 0) + relu(u). One task sums a head of an image alone, so that threads change nothing.
 */

/* sums that stay in registers: rows by vectors */
#define TILE_ROWS 4
#define TILE_VECTORS 2

/* out[r][j] += sum over steps of a[r * row_stride + step * step_stride] * b[step][j]; the others' rows lie a stride apart. */
typedef struct {
    int64_t rows, columns, steps;
    const float *a;
    int64_t row_stride, step_stride;
    const float *b;
    int64_t b_stride;
    float *out;
    int64_t out_stride;
} NAME(Sum);

/* phi; of NaN it is NaN. */
INLINE V NAME(positive)(V u) { return NAME(choose)(u > 0, u + 1.0f, NAME(exponential)(u)); }

INLINE void NAME(positive_row)(const float *row, int64_t count, float *out) {
    int64_t j = 0;
    for (; j + LANES <= count; j += LANES) NAME(store)(out + j, NAME(positive)(NAME(load)(row + j)));
    if (j == count) return;
    float buffer[LANES];
    NAME(store)(buffer, NAME(positive)(NAME(load_part)(row + j, count - j)));
    memcpy(out + j, buffer, (size_t)(count - j) * sizeof(float));
}

INLINE void NAME(prefetch_row)(const float *row, int64_t count) {
    for (int64_t j = 0; j < count; j += 16) __builtin_prefetch(row + j);
}

/* `rows` rows by `vectors` vectors; with both constant the sums stay in registers. */
INLINE void NAME(add_tile)(const NAME(Sum) *sum, int64_t row, int64_t column, const int rows, const int vectors) {
    V sums[TILE_ROWS][TILE_VECTORS];
    float *out = sum->out + row * sum->out_stride + column;
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
        for (int part = 0; part < vectors; ++part) sums[r][part] = NAME(load)(out + r * sum->out_stride + part * LANES);
    const float *a = sum->a + row * sum->row_stride, *b = sum->b + column;
    for (int64_t step = 0; step < sum->steps; ++step, a += sum->step_stride, b += sum->b_stride) {
        V values[TILE_VECTORS];
#pragma GCC unroll 2
        for (int part = 0; part < vectors; ++part) values[part] = NAME(load)(b + part * LANES);
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
            for (int part = 0; part < vectors; ++part) sums[r][part] += a[r * sum->row_stride] * values[part];
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
        for (int part = 0; part < vectors; ++part) NAME(store)(out + r * sum->out_stride + part * LANES, sums[r][part]);
}

INLINE void NAME(add_strip)(const NAME(Sum) *sum, int64_t column, const int vectors) {
    int64_t row = 0;
    for (; row + TILE_ROWS <= sum->rows; row += TILE_ROWS) NAME(add_tile)(sum, row, column, TILE_ROWS, vectors);
    for (; row < sum->rows; ++row) NAME(add_tile)(sum, row, column, 1, vectors);
}

static void NAME(add_product)(const NAME(Sum) *sum) {
    int64_t column = 0;
    for (; column + TILE_VECTORS * LANES <= sum->columns; column += TILE_VECTORS * LANES)
        NAME(add_strip)(sum, column, TILE_VECTORS);
    for (; column + LANES <= sum->columns; column += LANES) NAME(add_strip)(sum, column, 1);
    for (; column < sum->columns; ++column)
        for (int64_t row = 0; row < sum->rows; ++row) {
            float *out = sum->out + row * sum->out_stride + column;
            for (int64_t step = 0; step < sum->steps; ++step)
                *out += sum->a[row * sum->row_stride + step * sum->step_stride] * sum->b[step * sum->b_stride + column];
        }
}

/* Columns [column, column + count) of the projections of some rows, (rows, count). */
INLINE void NAME(project)(const LinearAttention *a, int64_t row, int64_t rows, int64_t column, int64_t count, float *out) {
    const int64_t width = a->heads * a->d, words = words_of(width);
    const Product product = {width, count, words, a->scale + column, a->bias + column, 0, out, 0, 0, 0};
    NAME(multiply)(&product, a->input + row * words, a->panels + column * words, 0, rows);
}

/* S and z of one head of one image. */
static void NAME(summarise)(const LinearAttention *a, int64_t task) {
    const int64_t image = task / a->heads, head = task % a->heads, width = a->heads * a->d, d = a->d;
    const int64_t stride = a->projected ? 3 * width : d, block = ATTENTION_ROWS * d;
    float *summary = a->summaries + task * (d + 1) * d, *total = summary + d * d, features[block];
    float buffer[a->projected ? 1 : 2 * block];
    memset(summary, 0, (size_t)((d + 1) * d) * sizeof(float));
    for (int64_t start = 0; start < a->tokens; start += ATTENTION_ROWS) {
        const int64_t count = a->tokens - start < ATTENTION_ROWS ? a->tokens - start : ATTENTION_ROWS;
        const int64_t first = image * a->tokens + start;
        const float *keys, *values;
        if (a->projected) {
            keys = a->projected + first * stride + width + head * d;
            values = keys + width;
        } else {
            keys = buffer;
            values = buffer + block;
            NAME(project)(a, first, count, width + head * d, d, buffer);
            NAME(project)(a, first, count, 2 * width + head * d, d, buffer + block);
        }
        for (int64_t row = 0; row < count; ++row) {
            if (a->projected && start + row + ATTENTION_ROWS < a->tokens) { /* rows lie too far apart for the processor to guess the next */
                const float *next = keys + (row + ATTENTION_ROWS) * stride;
                NAME(prefetch_row)(next, d);
                NAME(prefetch_row)(next + width, d);
            }
            NAME(positive_row)(keys + row * stride, d, features + row * d);
            for (int64_t j = 0; j < d; ++j) total[j] += features[row * d + j];
        }
        const NAME(Sum) sum = {d, d, count, features, 1, d, values, stride, summary, d};
        NAME(add_product)(&sum);
    }
}

/* Up to ATTENTION_ROWS tokens of one image from their queries, `stride` apart, all heads; out (count, heads * d). */
INLINE void NAME(read_summaries)(const LinearAttention *a, const float *queries, int64_t stride, int64_t image, int64_t count,
                                 float *out) {
    const int64_t width = a->heads * a->d, d = a->d;
    float features[ATTENTION_ROWS * d];
    memset(out, 0, (size_t)(count * width) * sizeof(float));
    for (int64_t head = 0; head < a->heads; ++head) {
        const float *summary = a->summaries + (image * a->heads + head) * (d + 1) * d;
        for (int64_t row = 0; row < count; ++row) {
            float *feature = features + row * d;
            NAME(positive_row)(queries + row * stride + head * d, d, feature);
            const float inverse = 1.0f / (NAME(dot)(feature, summary + d * d, d) + LINEAR_ATTENTION_EPS);
            for (int64_t j = 0; j < d; ++j) feature[j] *= inverse;
        }
        const NAME(Sum) sum = {count, d, d, features, d, 1, summary, d, out + head * d, width};
        NAME(add_product)(&sum);
    }
}

/* Blocks of ATTENTION_ROWS tokens never cross an image. */
static void NAME(attend_linear_blocks)(const LinearAttention *a, int64_t first, int64_t last) {
    const int64_t width = a->heads * a->d, per_image = (a->tokens + ATTENTION_ROWS - 1) / ATTENTION_ROWS;
    float buffer[a->out ? 1 : ATTENTION_ROWS * width], queries[a->projected ? 1 : ATTENTION_ROWS * width];
    for (int64_t block = first; block < last; ++block) {
        const int64_t image = block / per_image, start = block % per_image * ATTENTION_ROWS;
        const int64_t count = a->tokens - start < ATTENTION_ROWS ? a->tokens - start : ATTENTION_ROWS;
        const int64_t row = image * a->tokens + start;
        float *out = a->out ? a->out + row * width : buffer;
        if (!a->projected) NAME(project)(a, row, count, 0, width, queries);
        NAME(read_summaries)(a, a->projected ? a->projected + row * 3 * width : queries, a->projected ? 3 * width : width, image,
                             count, out);
        for (int64_t r = 0; a->bits && r < count; ++r)
            NAME(pack_row)(out + r * width, width, a->threshold, a->bits + (row + r) * words_of(width));
    }
}

#undef TILE_ROWS
#undef TILE_VECTORS
