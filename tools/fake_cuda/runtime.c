/* The part of CUDA's runtime and driver that PyTorch calls if it never launches a kernel.

   Memory is the host's, streams and events are empty, and every request is done at once. PyTorch
   never calls other functions, because tensor.py computes every operator on the CPU. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

typedef void *Pointer;
enum { OK = 0, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101 };
static const size_t MEMORY = 80ull << 30;
static const int CUDA = 13020;

/* cudaDeviceProp up to the last member that PyTorch reads before a launch. */
struct Properties {
  char name[256], uuid[16], luid[8];
  unsigned luid_mask;
  size_t memory, shared_memory;
  int registers, warp;
  size_t pitch;
  int threads, block[3], grid[3];
  size_t constants;
  int major, minor;
  size_t texture_alignment, pitch_alignment;
  int processors;
};

int cudaGetDeviceCount(int *count) { return *count = 1, OK; }
int cudaGetDevice(int *device) { return *device = 0, OK; }
int cudaSetDevice(int device) { return device ? INVALID_DEVICE : OK; }
int cudaDriverGetVersion(int *version) { return *version = CUDA, OK; }
int cudaRuntimeGetVersion(int *version) { return *version = CUDA, OK; }
int cudaGetLastError(void) { return OK; }
int cudaPeekAtLastError(void) { return OK; }
int cudaDeviceSynchronize(void) { return OK; }
int cudaProfilerStart(void) { return OK; }
int cudaProfilerStop(void) { return OK; }
int cudaDeviceCanAccessPeer(int *can, int a, int b) { return *can = 0, OK; }
int cudaDeviceGetStreamPriorityRange(int *low, int *high) { return *low = 0, *high = -5, OK; }

int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case 1: *value = 1024; break;  /* threads in a block */
    case 10: *value = 32; break;   /* threads in a warp */
    case 16: *value = 132; break;  /* multiprocessors */
    case 75: *value = 9; break;    /* major number of the compute capability */
    default: *value = 0;
  }
  return OK;
}

int cudaGetDeviceProperties(struct Properties *p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "fake CUDA device");
  p->major = 9;
  p->memory = MEMORY;
  p->processors = 132;
  p->warp = 32;
  p->threads = p->block[0] = p->block[1] = 1024;
  p->block[2] = 64;
  p->grid[0] = 2147483647;
  p->grid[1] = p->grid[2] = 65535;
  p->registers = 65536;
  p->shared_memory = 49152;
  return OK;
}

/* Memory. Pinned blocks are listed, because PyTorch asks whether a pointer is in one of them. */
struct Block {
  char *start;
  size_t size;
  struct Block *next;
};
static struct Block *pinned;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int get(Pointer *p, size_t size) { return (*p = malloc(size)) ? OK : OUT_OF_MEMORY; }

static void list(Pointer start, size_t size) {
  struct Block *block = malloc(sizeof *block);
  pthread_mutex_lock(&lock);
  *block = (struct Block){start, size, pinned};
  pinned = block;
  pthread_mutex_unlock(&lock);
}

static void unlist(Pointer start) {
  pthread_mutex_lock(&lock);
  for (struct Block **each = &pinned; *each; each = &(*each)->next)
    if ((*each)->start == start) {
      struct Block *gone = *each;
      *each = gone->next;
      free(gone);
      break;
    }
  pthread_mutex_unlock(&lock);
}

int cudaMalloc(Pointer *p, size_t size) { return get(p, size); }
int cudaFree(Pointer p) { return free(p), OK; }
int cudaHostAlloc(Pointer *p, size_t size, unsigned flags) {
  int failed = get(p, size);
  if (!failed) list(*p, size);
  return failed;
}
int cudaMallocHost(Pointer *p, size_t size) { return cudaHostAlloc(p, size, 0); }
int cudaFreeHost(Pointer p) { return unlist(p), free(p), OK; }
int cudaHostRegister(Pointer p, size_t size, unsigned flags) { return list(p, size), OK; }
int cudaHostUnregister(Pointer p) { return unlist(p), OK; }

int cudaPointerGetAttributes(Pointer attributes, Pointer p) {
  memset(attributes, 0, 24); /* type 0, unknown: memory that CUDA never saw */
  pthread_mutex_lock(&lock);
  for (struct Block *each = pinned; each; each = each->next)
    if ((char *)p >= each->start && (char *)p < each->start + each->size)
      *(int *)attributes = 1; /* type 1: memory of the host that CUDA knows */
  pthread_mutex_unlock(&lock);
  return OK;
}

int cudaMemGetInfo(size_t *free_, size_t *all) { return *free_ = *all = MEMORY, OK; }
int cudaMemcpy(Pointer to, Pointer from, size_t n, int kind) { return memcpy(to, from, n), OK; }
int cudaMemcpyAsync(Pointer to, Pointer from, size_t n, int kind, Pointer stream) {
  return memcpy(to, from, n), OK;
}
int cudaMemset(Pointer p, int value, size_t n) { return memset(p, value, n), OK; }
int cudaMemsetAsync(Pointer p, int value, size_t n, Pointer s) { return memset(p, value, n), OK; }
int cudaDeviceGetDefaultMemPool(Pointer *pool, int device) { return get(pool, 64); }
int cudaMemPoolSetAttribute(Pointer pool, int attribute, Pointer value) { return OK; }
int cudaGetSymbolAddress(Pointer *p, Pointer symbol) { return get(p, 64); }

/* Streams and events. */
int cudaStreamCreate(Pointer *s) { return get(s, 64); }
int cudaStreamCreateWithFlags(Pointer *s, unsigned flags) { return get(s, 64); }
int cudaStreamCreateWithPriority(Pointer *s, unsigned flags, int p) { return get(s, 64); }
int cudaStreamDestroy(Pointer s) { return OK; }
int cudaStreamQuery(Pointer s) { return OK; }
int cudaStreamSynchronize(Pointer s) { return OK; }
int cudaStreamWaitEvent(Pointer s, Pointer event, unsigned flags) { return OK; }
int cudaStreamGetPriority(Pointer s, int *priority) { return *priority = 0, OK; }
int cudaStreamIsCapturing(Pointer s, int *status) { return *status = 0, OK; }
int cudaStreamGetCaptureInfo(Pointer s, int *status, Pointer id, Pointer graph, Pointer nodes,
                             Pointer edges, Pointer count) {
  return *status = 0, OK;
}
int cudaThreadExchangeStreamCaptureMode(int *mode) { return *mode = 0, OK; }
int cudaLaunchHostFunc(Pointer s, Pointer function, Pointer data) { return OK; }
int cudaEventCreate(Pointer *e) { return get(e, 64); }
int cudaEventCreateWithFlags(Pointer *e, unsigned flags) { return get(e, 64); }
int cudaEventDestroy(Pointer e) { return free(e), OK; }
int cudaEventRecord(Pointer e, Pointer s) { return OK; }
int cudaEventRecordWithFlags(Pointer e, Pointer s, unsigned flags) { return OK; }
int cudaEventQuery(Pointer e) { return OK; }
int cudaEventSynchronize(Pointer e) { return OK; }
int cudaEventElapsedTime(float *ms, Pointer a, Pointer b) { return *ms = 0, OK; }

/* Kernels. None is launched. */
int cudaFuncGetAttributes(Pointer attributes, Pointer f) { return memset(attributes, 0, 64), OK; }
int cudaFuncSetAttribute(Pointer f, int attribute, int value) { return OK; }

/* The driver. */
int cudaGetDriverEntryPointByVersion(const char *name, Pointer *function, unsigned version,
                                     unsigned long long flags, int *result) {
  *function = NULL;
  if (result) *result = 1; /* not found */
  return OK;
}
int cudaDeviceGetPCIBusId(char *name, int n, int device) { return strcpy(name, "0000:00:00.0"), OK; }
int cuInit(unsigned flags) { return OK; }
int cuCtxGetCurrent(Pointer *context) { return *context = (Pointer)1, OK; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  return *flags = 0, *active = 1, OK;
}
int cuGetErrorString(int error, const char **words) { return *words = "fake CUDA device", OK; }
