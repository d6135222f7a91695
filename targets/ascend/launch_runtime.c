/* What launchers of operations need: scratch in global memory, whole grids, integers of the host graph. They include
   this file. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define V4C_MOST_BUFFERS 32
struct v4c_memref { char *allocated, *aligned; int64_t offset, size, stride; };
typedef void (*v4c_program)(struct v4c_memref *, const int32_t *scalars, const int32_t *place);

void v4c_begin(int64_t count, char **base, int64_t *size);
void v4c_end_program(void);
void v4c_release(void);
const int64_t *v4c_fault(void);

struct scratch { struct scratch *next; };
static _Thread_local struct scratch *held;

/* Starts as NaN, or -1: what is read before it is written shows. 64 bytes in front keep the list. */
__attribute__((unused)) static char *v4c_scratch(int64_t bytes) {
    struct scratch *made = aligned_alloc(64, (64 + bytes + 63) & ~(int64_t)63);
    if (!made) abort();
    made->next = held;
    held = made;
    memset((char *)made + 64, 0xFF, bytes);
    return (char *)made + 64;
}

__attribute__((unused)) static void v4c_scratch_release(void) {
    while (held) {
        struct scratch *next = held->next;
        free(held);
        held = next;
    }
}

__attribute__((unused)) static char *v4c_narrowed(const char *wide, int64_t count) {
    int32_t *narrow = (int32_t *)v4c_scratch(4 * count);
    for (int64_t i = 0; i < count; ++i) narrow[i] = (int32_t)((const int64_t *)wide)[i];
    return (char *)narrow;
}

__attribute__((unused)) static void v4c_widen(const char *narrow, char *wide, int64_t count) {
    for (int64_t i = 0; i < count; ++i) ((int64_t *)wide)[i] = ((const int32_t *)narrow)[i];
}

__attribute__((unused)) static int v4c_launch(const char *name, v4c_program program, int64_t count, struct v4c_memref *m, const int32_t *scalars,
               const int64_t *grid) {
    char *bases[V4C_MOST_BUFFERS];
    int64_t sizes[V4C_MOST_BUFFERS];
    for (int64_t i = 0; i < count; ++i) { bases[i] = m[i + 2].aligned; sizes[i] = m[i + 2].size; }
    v4c_begin(count, bases, sizes);
    int status = 0;
    for (int64_t x = 0; x < grid[0] && !status; ++x)
        for (int64_t y = 0; y < grid[1] && !status; ++y)
            for (int64_t z = 0; z < grid[2] && !status; ++z) {
                const int32_t place[6] = {(int32_t)grid[0], (int32_t)grid[1], (int32_t)grid[2],
                                          (int32_t)x, (int32_t)y, (int32_t)z};
                program(m, scalars, place);
                v4c_end_program();
                const int64_t *fault = v4c_fault();
                if (fault[0] >= 0) {
                    fprintf(stderr, "kernel %s: program %d, %d, %d %s elements %lld to %lld of argument %lld, which has %lld\n",
                            name, place[3], place[4], place[5], fault[3] ? "writes" : "reads", (long long)fault[1],
                            (long long)fault[2], (long long)fault[0], (long long)sizes[fault[0]]);
                    status = 1;
                }
            }
    v4c_release();
    return status;
}
