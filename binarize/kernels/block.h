/* What follows the attention in a decoder block, part of path.h. A few rows go through all of it before the next ones, so that
 * what lies between never leaves the cache.
 */

/* Rows [first, last), at most ROW_BLOCK: x = projection (+ residual); out = x + fc2(fc1(bits of layer norm of x)). */
static void NAME(project_and_transform)(const BlockTail *t, int64_t first, int64_t last) {
    const int64_t width = t->width, count = last - first;
    float *x = t->out + first * width;
    uint32_t normal[ROW_BLOCK * words_of(width)], hidden[ROW_BLOCK * words_of(t->hidden)];
    const float *residual = t->residual ? t->residual + first * width : 0;
    const Product proj = {width, width, words_of(width), t->proj_scale, t->proj_bias, residual, x, 0, 0, 0};
    NAME(multiply)(&proj, t->bits + first * words_of(width), t->proj_panels, 0, count);
    NAME(layer_norm_pack_rows)(x, 0, count, width, t->norm_weight, t->norm_bias, t->eps, t->threshold, normal);
    const Product fc1 = {width, t->hidden, words_of(width), 0, 0, 0, 0, t->low, t->span, hidden};
    for (int64_t row = 0; row < count; ++row) hidden[(row + 1) * words_of(t->hidden) - 1] = 0; /* perhaps no panel writes it */
    NAME(multiply)(&fc1, normal, t->fc1_panels, 0, count);
    const Product fc2 = {t->hidden, width, words_of(t->hidden), t->fc2_scale, t->fc2_bias, x, x, 0, 0, 0};
    NAME(multiply)(&fc2, hidden, t->fc2_panels, 0, count);
}
