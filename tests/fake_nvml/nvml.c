/* A scripted libnvidia-ml.so.1. The text file that FAKE_NVML_FILE names has these lines, in any order:
 *
 *   INDEX UUID TOTAL_BYTES FREE_BYTES MIG [BUS [PID,PID,...]]     a GPU
 *   is INDEX KEY=VALUE ...                                        more of it: name, numa, util, temp,
 *                                                                 ecc; each new xid is an event
 *   hang                                                          calls about GPUs do not return
 *   link A B nvlink|board|switch|switches|hostbridge|node|system  how close two of them are
 *
 * A free memory of "-" is not told, a UUID of "lost" makes the GPU unreachable; the PIDs hold what is not
 * free, in equal parts; '#' begins a comment. A file that begins with "broken" makes nvmlInit fail.
 * The file is read again by every call that needs it, so a test may change it. Built with -DOLD_DRIVER,
 * the library has only what NVML always had: no processes, links, MIG or affinity.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

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
    int numa;
    unsigned util, temp, ecc, xid;
    char uuid[80], free[32], pids[128], name[64];
    unsigned long long total;
} gpu_t;

static char handles[MAX_GPUS];

static FILE *script(void) {
    const char *path = getenv("FAKE_NVML_FILE");
    return path ? fopen(path, "r") : NULL;
}

/* "is INDEX KEY=VALUE ...": the GPU's own line comes first. */
static void read_more(char *line, gpu_t *gpus, int count) {
    char *word = strtok(line, " \n");
    int index = (word = strtok(NULL, " \n")) ? atoi(word) : -1;
    while ((word = strtok(NULL, " \n"))) {
        char *value = strchr(word, '=');
        for (int i = 0; value && i < count; i++) {
            if ((int)gpus[i].index != index)
                continue;
            if (strncmp(word, "name=", 5) == 0)
                snprintf(gpus[i].name, sizeof gpus[i].name, "%s", value + 1);
            unsigned number = (unsigned)strtoul(value + 1, NULL, 10);
            if (strncmp(word, "numa=", 5) == 0)
                gpus[i].numa = (int)number;
            if (strncmp(word, "util=", 5) == 0)
                gpus[i].util = number;
            if (strncmp(word, "temp=", 5) == 0)
                gpus[i].temp = number;
            if (strncmp(word, "ecc=", 4) == 0)
                gpus[i].ecc = number;
            if (strncmp(word, "xid=", 4) == 0)
                gpus[i].xid = number;
        }
    }
}

static int read_gpus(gpu_t *gpus) {
    FILE *file = script();
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
        if (strncmp(line, "hang", 4) == 0)
            sleep(1000);
        if (strncmp(line, "is ", 3) == 0)
            read_more(line, gpus, count);
        memset(gpu, 0, sizeof *gpu);
        gpu->numa = -1;
        snprintf(gpu->name, sizeof gpu->name, "Scripted GPU");
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
    gpu_t gpu;
    int rc = gpu_of(device, &gpu);
    if (rc == SUCCESS)
        snprintf(name, length, "%s", gpu.name);
    return rc;
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
    /* No domain that a real device of the machine could have. */
    pci->domain = 0xfa;
    pci->bus = gpu.bus;
    snprintf(pci->bus_id, sizeof pci->bus_id, "000000FA:%02X:00.0", gpu.bus & 0xff);
    return SUCCESS;
}

#ifndef OLD_DRIVER

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

int nvmlDeviceGetMemoryAffinity(void *device, unsigned size, unsigned long *nodes, unsigned scope) {
    gpu_t gpu;
    int rc = gpu_of(device, &gpu);
    (void)scope;
    if (rc != SUCCESS)
        return rc;
    if (gpu.numa < 0 || gpu.numa >= (int)size * 64)
        return NOT_SUPPORTED;
    memset(nodes, 0, size * sizeof *nodes);
    nodes[gpu.numa / 64] = 1ul << gpu.numa % 64;
    return SUCCESS;
}

/* The word of the "link" line between two GPUs, or nothing. */
static int link_of(void *one, void *other, char *word) {
    unsigned a = (unsigned)((char *)one - handles), b = (unsigned)((char *)other - handles), x, y;
    FILE *file = script();
    char line[256];
    int found = 0;
    while (file && !found && fgets(line, sizeof line, file))
        found = sscanf(line, "link %u %u %31s", &x, &y, word) == 3 &&
                ((x == a && y == b) || (x == b && y == a));
    if (file)
        fclose(file);
    return found;
}

int nvmlDeviceGetP2PStatus(void *one, void *other, unsigned capability, unsigned *status) {
    enum { NVLINK = 2, P2P_OK = 0, P2P_NOT_SUPPORTED = 5 };
    char word[32];
    *status = capability == NVLINK && link_of(one, other, word) && strcmp(word, "nvlink") == 0
                  ? P2P_OK
                  : P2P_NOT_SUPPORTED;
    return SUCCESS;
}

int nvmlDeviceGetTopologyCommonAncestor(void *one, void *other, unsigned *level) {
    static const char *const words[] = {"board", "switch", "switches", "hostbridge", "node", "system"};
    char word[32];
    if (!link_of(one, other, word))
        return NOT_SUPPORTED;
    for (unsigned i = 0; i < 6; i++)
        if (strcmp(word, words[i]) == 0) {
            *level = i * 10;
            return SUCCESS;
        }
    return NOT_SUPPORTED;
}

int nvmlDeviceGetUtilizationRates(void *device, unsigned rates[2]) {
    gpu_t gpu;
    int rc = gpu_of(device, &gpu);
    if (rc == SUCCESS)
        rates[0] = rates[1] = gpu.util;
    return rc;
}

int nvmlDeviceGetTemperature(void *device, unsigned sensor, unsigned *celsius) {
    gpu_t gpu;
    int rc = gpu_of(device, &gpu);
    (void)sensor;
    if (rc == SUCCESS)
        *celsius = gpu.temp;
    return rc;
}

int nvmlDeviceGetTotalEccErrors(void *device, unsigned kind, unsigned since, unsigned long long *count) {
    gpu_t gpu;
    int rc = gpu_of(device, &gpu);
    (void)kind, (void)since;
    if (rc == SUCCESS)
        *count = gpu.ecc;
    return rc;
}

typedef struct {
    void *device;
    unsigned last;
} events_t;

int nvmlEventSetCreate(events_t **set) {
    *set = calloc(1, sizeof **set);
    return SUCCESS;
}

int nvmlEventSetFree(events_t *set) {
    free(set);
    return SUCCESS;
}

int nvmlDeviceRegisterEvents(void *device, unsigned long long types, events_t *set) {
    (void)types;
    set->device = device;
    return SUCCESS;
}

typedef struct {
    void *device;
    unsigned long long type, data;
    unsigned gpu_instance, compute_instance;
} event_t;

int nvmlEventSetWait_v2(events_t *set, event_t *event, unsigned timeout) {
    enum { XID = 8, TIMEOUT = 10 };
    gpu_t gpu;
    (void)timeout;
    if (gpu_of(set->device, &gpu) != SUCCESS || gpu.xid == set->last)
        return TIMEOUT;
    set->last = gpu.xid;
    *event = (event_t){.device = set->device, .type = XID, .data = gpu.xid};
    return SUCCESS;
}

#endif
