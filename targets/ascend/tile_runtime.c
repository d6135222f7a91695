/* What a simulated tile program needs of its machine: local memory, and copies that stay inside their buffers. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Local memory: taken from the front of chunks, all given back at once when a program ends. */
struct chunk { struct chunk *next; int64_t size; char bytes[]; };
static _Thread_local struct chunk *first, *current; /* of the thread: sessions run in several */
static _Thread_local int64_t used;

void *_mlir_memref_to_llvm_alloc(int64_t size) {
    size = (size + 63) & ~(int64_t)63;
    while (current && used + size > current->size) {
        if (!current->next) break;
        current = current->next;
        used = 0;
    }
    if (!current || used + size > current->size) {
        int64_t room = size > (1 << 20) ? size : 1 << 20;
        struct chunk *fresh = malloc(sizeof(struct chunk) + room + 64);
        if (!fresh) abort();
        fresh->next = NULL;
        fresh->size = room;
        if (current) current->next = fresh; else first = fresh;
        current = fresh;
        used = 0;
    }
    char *start = (char *)(((uintptr_t)current->bytes + 63) & ~(uintptr_t)63) + used;
    used += size;
    memset(start, 0xFF, size); /* NaN in every float format: what is read before it is written shows */
    return start;
}
void *_mlir_memref_to_llvm_aligned_alloc(int64_t alignment, int64_t size) {
    (void)alignment;
    return _mlir_memref_to_llvm_alloc(size);
}
void _mlir_memref_to_llvm_free(void *pointer) { (void)pointer; }
void v4c_end_program(void) { current = first; used = 0; }
void v4c_release(void) {
    while (first) { struct chunk *next = first->next; free(first); first = next; }
    current = NULL;
    used = 0;
}

/* Buffers in global memory, and the first access outside one: buffer, lowest and highest element, 1 where written. */
static _Thread_local int64_t buffers;
static _Thread_local char **bases;
static _Thread_local int64_t *sizes;
static _Thread_local int64_t fault[4];

void v4c_begin(int64_t count, char **base, int64_t *size) {
    buffers = count;
    bases = base;
    sizes = size;
    fault[0] = -1;
}
const int64_t *v4c_fault(void) { return fault; }

/* A ranked memref's descriptor: allocated, aligned, offset, sizes, strides; in elements. */
static int inside(int64_t rank, const int64_t *d, int written) {
    const int64_t *n = d + 3, *stride = d + 3 + rank;
    int64_t low = d[2], high = d[2];
    for (int64_t i = 0; i < rank; ++i) {
        if (n[i] <= 0) return 1;
        int64_t reach = (n[i] - 1) * stride[i];
        if (reach < 0) low += reach; else high += reach;
    }
    for (int64_t b = 0; b < buffers; ++b) {
        if ((char *)d[1] != bases[b] || (low >= 0 && high < sizes[b])) continue;
        if (fault[0] < 0) { fault[0] = b; fault[1] = low; fault[2] = high; fault[3] = written; }
        return 0;
    }
    return 1;
}

static void copy(int64_t size, int64_t rank, const int64_t *n, const char *s, const int64_t *ss, char *d, const int64_t *ds) {
    if (rank == 0) { memcpy(d, s, size); return; }
    if (rank == 1 && *ss == 1 && *ds == 1) { if (*n > 0) memmove(d, s, size * *n); return; }
    for (int64_t i = 0; i < *n; ++i)
        copy(size, rank - 1, n + 1, s + i * *ss * size, ss + 1, d + i * *ds * size, ds + 1);
}

static void checked_copy(int64_t size, int64_t rank, const int64_t *s, const int64_t *d) {
    int safe = inside(rank, s, 0) & inside(rank, d, 1);
    if (safe) copy(size, rank, s + 3, (char *)s[1] + s[2] * size, s + 3 + rank, (char *)d[1] + d[2] * size, d + 3 + rank);
}

#define COPY(type, size) \
    void v4c_copy_##type(int64_t rank, int64_t *s, int64_t ignored, int64_t *d) { (void)ignored; checked_copy(size, rank, s, d); }
COPY(f32, 4)
COPY(f16, 2)
COPY(bf16, 2)
COPY(i1, 1)
COPY(i8, 1)
COPY(i16, 2)
COPY(i32, 4)
COPY(i64, 8)

/* Rounding to FP8 (OCP 8-bit floating point specification): e4m3 has no infinity, e5m2 has. */
static float rounded(float value, int bits, int smallest, float largest, float beyond) {
    float size = fabsf(value);
    if (isnan(value) || size == 0) return value;
    if (isinf(value)) return copysignf(beyond, value);
    int exponent = ilogbf(size);
    float step = ldexpf(1.0f, (exponent < smallest ? smallest : exponent) - bits);
    float nearest = rintf(size / step) * step;
    return copysignf(nearest > largest ? beyond : nearest, value);
}
float v4c_round_f8E4M3FN(float value) { return rounded(value, 3, -6, 448.0f, NAN); }
float v4c_round_f8E5M2(float value) { return rounded(value, 2, -14, 57344.0f, INFINITY); }

#ifdef __x86_64__
/* For processors without bfloat16 conversion where libgcc is older than 13. A bfloat16 comes back in the low half of
   xmm0, as a half float does. */
__attribute__((weak)) _Float16 __truncsfbf2(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint16_t high = (bits & 0x7FFFFFFF) > 0x7F800000 ? (bits >> 16) | 0x40 : (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    _Float16 result;
    memcpy(&result, &high, 2);
    return result;
}
#endif
