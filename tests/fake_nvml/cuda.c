/* A scripted libcuda: as many GPUs as CUDA_VISIBLE_DEVICES names, whose memory is the host's. FAKE_CUDA: "hang" makes
 * cuInit hang, "nogpu" makes it fail, "nolock" refuses to register memory, "slow" delays every copy, "apart" keeps GPUs
 * from reading each other.
 */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100 };

static int told(const char *word) {
    const char *told = getenv("FAKE_CUDA");
    return told && strcmp(told, word) == 0;
}

int cuInit(unsigned flags) {
    (void)flags;
    if (told("hang"))
        sleep(1000);
    return told("nogpu") ? NO_DEVICE : SUCCESS;
}

int cuGetErrorString(int error, const char **text) {
    *text = error == NO_DEVICE ? "no CUDA-capable device" : "scripted error";
    return SUCCESS;
}

int cuDriverGetVersion(int *version) {
    *version = 12080;
    return SUCCESS;
}

int cuDeviceGetCount(int *count) {
    const char *seen = getenv("CUDA_VISIBLE_DEVICES");
    *count = seen && *seen ? 1 : 0;
    for (; seen && *seen; seen++)
        *count += *seen == ',';
    return SUCCESS;
}

int cuDeviceGet(int *device, int ordinal) {
    int count;
    cuDeviceGetCount(&count);
    *device = ordinal;
    return ordinal >= 0 && ordinal < count ? SUCCESS : INVALID_VALUE;
}

int cuDeviceCanAccessPeer(int *can, int device, int peer) {
    *can = !told("apart");
    return device != peer ? SUCCESS : INVALID_VALUE;
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
    static int one;
    (void)device;
    *context = &one;
    return SUCCESS;
}

int cuCtxSetCurrent(void *context) { return context ? SUCCESS : INVALID_VALUE; }

int cuMemHostRegister_v2(void *start, size_t size, unsigned flags) {
    (void)flags;
    if (told("nolock"))
        return OUT_OF_MEMORY;
    return start && size ? SUCCESS : INVALID_VALUE;
}

int cuMemAlloc_v2(unsigned long long *there, size_t size) {
    *there = (unsigned long long)malloc(size);
    return *there ? SUCCESS : OUT_OF_MEMORY;
}

static int copy(void *to, const void *from, size_t size) {
    if (told("slow"))
        usleep(200 * 1000);
    memcpy(to, from, size);
    return SUCCESS;
}

int cuMemcpyHtoD_v2(unsigned long long there, const void *here, size_t size) {
    return copy((void *)there, here, size);
}

int cuMemcpyDtoH_v2(void *here, unsigned long long there, size_t size) {
    return copy(here, (void *)there, size);
}
