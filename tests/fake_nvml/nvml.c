/* A scripted libnvidia-ml.so.1: the GPUs stand in the text file that FAKE_NVML_FILE names, one per
 * line: INDEX UUID TOTAL_BYTES FREE_BYTES MIG [BUS [PID,PID,...]]. A free memory of "-" is not told,
 * a UUID of "lost" makes the GPU unreachable; the PIDs hold what is not free, in equal parts; '#'
 * begins a comment. A file that begins with "broken" makes nvmlInit fail. The file is read again by
 * every call that needs it, so a test may change it.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    SUCCESS = 0,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9,
    GPU_LOST = 15
};
enum { MAX_GPUS = 16 };

typedef struct {
    unsigned index, mig, bus;
    char uuid[80], free[32], pids[128];
    unsigned long long total;
} gpu_t;

static char handles[MAX_GPUS];

static int read_gpus(gpu_t *gpus) {
    const char *path = getenv("FAKE_NVML_FILE");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[256];
    int count = 0;
    if (!file)
        return -1;
    while (count < MAX_GPUS && fgets(line, sizeof line, file)) {
        gpu_t *gpu = &gpus[count];
        if (strncmp(line, "broken", 6) == 0) {
            fclose(file);
            return -1;
        }
        memset(gpu, 0, sizeof *gpu);
        int fields = sscanf(line, "%u %79s %llu %31s %u %u %127s", &gpu->index, gpu->uuid,
                            &gpu->total, gpu->free, &gpu->mig, &gpu->bus, gpu->pids);
        if (line[0] == '#' || fields < 5)
            continue;
        if (fields < 6)
            gpu->bus = gpu->index + 1;
        count++;
    }
    fclose(file);
    return count;
}

/* The GPU behind a handle: handles are addresses of an array, in NVML's order. */
static int gpu_of(void *device, gpu_t *gpu) {
    gpu_t gpus[MAX_GPUS];
    int count = read_gpus(gpus), place = (int)((char *)device - handles);
    if (place < 0 || place >= count)
        return INVALID_ARGUMENT;
    *gpu = gpus[place];
    return strcmp(gpu->uuid, "lost") == 0 ? GPU_LOST : SUCCESS;
}

int nvmlInit_v2(void) {
    gpu_t gpus[MAX_GPUS];
    return read_gpus(gpus) < 0 ? DRIVER_NOT_LOADED : SUCCESS;
}

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    return nvmlInit_v2();
}

int nvmlShutdown(void) { return SUCCESS; }

const char *nvmlErrorString(int code) { return code ? "scripted error" : "success"; }

int nvmlSystemGetDriverVersion(char *version, unsigned length) {
    snprintf(version, length, "570.00");
    return SUCCESS;
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    gpu_t gpus[MAX_GPUS];
    int found = read_gpus(gpus);
    *count = found < 0 ? 0 : (unsigned)found;
    return found < 0 ? DRIVER_NOT_LOADED : SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    gpu_t gpu;
    if (index >= MAX_GPUS)
        return INVALID_ARGUMENT;
    *device = &handles[index];
    return gpu_of(*device, &gpu);
}

int nvmlDeviceGetIndex(void *device, unsigned *index) {
    *index = (unsigned)((char *)device - handles);
    return SUCCESS;
}

int nvmlDeviceGetName(void *device, char *name, unsigned length) {
    (void)device;
    snprintf(name, length, "Scripted GPU");
    return SUCCESS;
}

int nvmlDeviceGetUUID(void *device, char *uuid, unsigned length) {
    gpu_t gpu;
    int rc = gpu_of(device, &gpu);
    if (rc == SUCCESS)
        snprintf(uuid, length, "%s", gpu.uuid);
    return rc;
}

typedef struct {
    unsigned version;
    unsigned long long total, reserved, free, used;
} memory_v2_t;

int nvmlDeviceGetMemoryInfo_v2(void *device, memory_v2_t *memory) {
    gpu_t gpu;
    int rc = gpu_of(device, &gpu);
    if (rc != SUCCESS)
        return rc;
    if (strcmp(gpu.free, "-") == 0)
        return NOT_SUPPORTED;
    memory->total = gpu.total;
    memory->free = strtoull(gpu.free, NULL, 10);
    memory->reserved = 0;
    memory->used = memory->total - memory->free;
    return SUCCESS;
}

typedef struct {
    unsigned long long total, free, used;
} memory_t;

int nvmlDeviceGetMemoryInfo(void *device, memory_t *memory) {
    memory_v2_t v2;
    int rc = nvmlDeviceGetMemoryInfo_v2(device, &v2);
    if (rc == SUCCESS)
        *memory = (memory_t){v2.total, v2.free, v2.used};
    return rc;
}

typedef struct {
    char legacy[16];
    unsigned domain, bus, device, device_id, subsystem_id;
    char bus_id[32];
} pci_t;

int nvmlDeviceGetPciInfo_v3(void *device, pci_t *pci) {
    gpu_t gpu;
    int rc = gpu_of(device, &gpu);
    if (rc != SUCCESS)
        return rc;
    memset(pci, 0, sizeof *pci);
    pci->bus = gpu.bus;
    snprintf(pci->bus_id, sizeof pci->bus_id, "00000000:%02X:00.0", gpu.bus & 0xff);
    return SUCCESS;
}

int nvmlDeviceGetMigMode(void *device, unsigned *current, unsigned *pending) {
    gpu_t gpu;
    int rc = gpu_of(device, &gpu);
    if (rc == SUCCESS)
        *current = *pending = gpu.mig;
    return rc;
}

typedef struct {
    unsigned pid;
    unsigned long long used;
    unsigned gpu_instance, compute_instance;
} process_t;

int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, process_t *processes) {
    gpu_t gpu;
    unsigned found = 0, room = processes ? *count : 0;
    int rc = gpu_of(device, &gpu);
    if (rc != SUCCESS)
        return rc;
    for (char *pid = strtok(gpu.pids, ","); pid; pid = strtok(NULL, ","), found++)
        if (found < room)
            processes[found] = (process_t){.pid = (unsigned)strtoul(pid, NULL, 10)};
    for (unsigned i = 0; i < found && i < room; i++)
        processes[i].used = (gpu.total - strtoull(gpu.free, NULL, 10)) / found;
    *count = found;
    return found > room ? INSUFFICIENT_SIZE : SUCCESS;
}
