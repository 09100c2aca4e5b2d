// The work of a decode step on a CPU beside its matrix products, each in one pass over the memory.
//
// SIZE is the size of a head. With BFLOAT16 a number is stored as the upper half of a float32, else
// as float32; all sums are in float32. A sequence's numbers depend on nothing but the sequence.

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef BFLOAT16
typedef uint16_t number;
typedef uint16_t pattern __attribute__((may_alias));
enum { MAGNITUDE = 0x7fff, NUMBERS_IN_LANE = 2 };
static inline float widen(number one) {
    union { uint32_t bits; float value; } it = {(uint32_t)one << 16};
    return it.value;
}
static inline number narrow(float value) {  // to the nearest; of two equally near, to the even one
    union { float value; uint32_t bits; } it = {value};
    return (number)((it.bits + 0x7fff + ((it.bits >> 16) & 1)) >> 16);
}
#else
typedef float number;
typedef uint32_t pattern __attribute__((may_alias));
enum { MAGNITUDE = 0x7fffffff, NUMBERS_IN_LANE = 1 };
static inline float widen(number one) { return one; }
static inline number narrow(float value) { return value; }
#endif

// A head's numbers as PARTS vectors of LANES floats. Of two bfloat16 in a lane, the even one goes
// to one vector and the odd one to the next: so nothing moves between lanes, and the order matters
// neither to a dot product nor to a sum of vectors.
enum { AHEAD = 2048 / sizeof(number) };  // processors prefetch by themselves, but not past a page
enum { LANES = SIZE / NUMBERS_IN_LANE < 16 ? SIZE / NUMBERS_IN_LANE : 16, PARTS = SIZE / LANES };
typedef float wide __attribute__((vector_size(LANES * sizeof(float))));
typedef uint32_t words __attribute__((vector_size(LANES * sizeof(uint32_t))));
typedef words stored __attribute__((aligned(2), may_alias));

static inline wide part_of(const number *head, int part) {
    const words lanes = ((const stored *)head)[part / NUMBERS_IN_LANE];
    if (NUMBERS_IN_LANE == 1) return (wide)lanes;
    return (wide)(part % 2 ? lanes & 0xffff0000 : lanes << 16);
}

static inline float number_of(const wide parts[PARTS], int index) {
    const int lane = index / NUMBERS_IN_LANE;
    return parts[lane / LANES * NUMBERS_IN_LANE + index % NUMBERS_IN_LANE][lane % LANES];
}

static inline float sum(wide lanes) {
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += lanes[lane];
    return total;
}

// e^x for x <= 0, with a relative error below 5e-6: 2^whole * 2^fraction, the latter by its Taylor
// series around 0. In plain arithmetic, which compilers turn into vectors. Below -87, the end of a
// float32, it returns e^-87, which is as good as 0. NaN stays NaN.
static inline float exponential(float x) {
    const float scaled = (x < -87.0f ? -87.0f : x) * 1.44269504f;
    const float whole = scaled >= -126.0f ? rintf(scaled) : 0.0f;
    const float y = (scaled - whole) * 0.69314718f;
    union { uint32_t bits; float value; } power = {(uint32_t)((int32_t)whole + 127) << 23};
    return power.value *
           (1 + y * (1 + y * (0.5f + y * (1 / 6.0f +
                                          y * (1 / 24.0f + y * (1 / 120.0f + y / 720))))));
}

// Attention of one query of each sequence:
// out[sequence][head] = softmax(q . keys / sqrt(SIZE) + mask[sequence]) . values.
// Strides are in numbers, the same for keys and values; a head's positions are contiguous. The mask
// may be absent.
void attend(const number *q, const number *keys, const number *values, const number *mask,
            number *out, int64_t sequences, int64_t heads, int64_t positions, int64_t q_stride,
            int64_t sequence_stride, int64_t head_stride, int64_t mask_stride, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t pair = 0; pair < sequences * heads; pair++) {
        const int64_t sequence = pair / heads, head = pair % heads;
        const int64_t start = sequence * sequence_stride + head * head_stride;
        const float scale = 1 / sqrtf(SIZE);
        wide query[PARTS], read[PARTS] = {};
        // Aligned, or the order of sums could depend on the address.
        float scores[positions] __attribute__((aligned(64)));
        float most = -INFINITY, total = 0;
        for (int part = 0; part < PARTS; part++)
            query[part] = part_of(q + sequence * q_stride + head * SIZE, part) * scale;
        for (int64_t t = 0; t < positions; t++) {
            const number *key = keys + start + t * SIZE;
            wide products = query[0] * part_of(key, 0);
            __builtin_prefetch(key + AHEAD);
            for (int part = 1; part < PARTS; part++) products += query[part] * part_of(key, part);
            scores[t] = sum(products);
        }
        if (mask)
            for (int64_t t = 0; t < positions; t++)
                scores[t] += widen(mask[sequence * mask_stride + t]);
#pragma omp simd reduction(max : most)
        for (int64_t t = 0; t < positions; t++) most = scores[t] > most ? scores[t] : most;
#pragma omp simd reduction(+ : total)
        for (int64_t t = 0; t < positions; t++) total += scores[t] = exponential(scores[t] - most);
        for (int64_t t = 0; t < positions; t++) {
            const number *value = values + start + t * SIZE;
            __builtin_prefetch(value + AHEAD);
            for (int part = 0; part < PARTS; part++) read[part] += scores[t] * part_of(value, part);
        }
        for (int d = 0; d < SIZE; d++) out[pair * SIZE + d] = narrow(number_of(read, d) / total);
    }
}

// Round each row of x to int8, so that its largest number is 126 times the row's scale; a row of
// zeros has scale 0. If the scale is too small to divide by, or not finite, the row becomes zeros:
// the scale alone then says what a product with it is.
void quantise_rows(const number *x, int8_t *rounded, number *scales, int64_t rows, int64_t width,
                   int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows > 32)
    for (int64_t row = 0; row < rows; row++) {
        const number *own = x + row * width;
        const pattern *patterns = (const pattern *)own;
        // Without their signs, numbers are in the order of their bits.
        union { pattern bits; number one; } most = {0};
        for (int64_t i = 0; i < width; i++) {
            const pattern size = patterns[i] & MAGNITUDE;
            most.bits = size > most.bits ? size : most.bits;
        }
        scales[row] = narrow(widen(most.one) / 126);
        const float scale = widen(scales[row]);
        if (!(scale > 1e-30f && scale < INFINITY)) {
            memset(rounded + row * width, 0, width);
            continue;
        }
        for (int64_t i = 0; i < width; i++)
            rounded[row * width + i] = (int8_t)rintf(widen(own[i]) * (1 / scale));
    }
}
