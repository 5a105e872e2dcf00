/* A libnvidia-ml.so.1 for tests: the file that NVML_STUB names says what each function answers, a line each:
 *   NAME VALUE     the value
 *   NAME !CODE     an error of NVML (3 not supported, 6 not found, 15 the GPU is lost)
 * What no line names is not supported. It is read anew at each call, so a test can lose a GPU between two. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int answer(const char *name, unsigned long long *value) {
  char line[256], said[128];
  FILE *file = fopen(getenv("NVML_STUB"), "r");
  int code = 3;
  if (!file) return 999;
  while (fgets(line, sizeof line, file)) {
    char *rest = strchr(line, ' ');
    if (!rest) continue;
    *rest++ = 0;
    if (strcmp(line, name) || sscanf(rest, "%127s", said) != 1) continue;
    code = said[0] == '!' ? atoi(said + 1) : 0;
    if (!code) *value = strtoull(said, NULL, 0);
  }
  fclose(file);
  return code;
}

static int number(const char *name, unsigned *out) {
  unsigned long long value = 0;
  int code = answer(name, &value);
  if (!code) *out = (unsigned)value;
  return code;
}

static int text(const char *name, char *out, unsigned size) {
  unsigned value;
  int code = number(name, &value);
  if (!code) snprintf(out, size, "%s %u", name, value);
  return code;
}

int nvmlInitWithFlags(unsigned flags) { unsigned ok; (void)flags; return number("init", &ok); }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { (void)code; return "an error"; }
int nvmlSystemGetDriverVersion(char *out, unsigned size) { return text("driver", out, size); }
int nvmlSystemGetCudaDriverVersion_v2(int *out) { return number("cuda", (unsigned *)out); }
int nvmlDeviceGetCount_v2(unsigned *out) { return number("count", out); }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **out) {
  unsigned ok;
  *out = (void *)(size_t)(index + 1);
  return number(index ? "second" : "first", &ok);
}
int nvmlDeviceGetHandleByUUID(const char *uuid, void **out) {
  unsigned ok;
  *out = (void *)1;
  return number(uuid, &ok);
}
int nvmlDeviceGetName(void *device, char *out, unsigned size) { (void)device; return text("name", out, size); }
int nvmlDeviceGetPowerUsage(void *device, unsigned *out) { (void)device; return number("power_mw", out); }
int nvmlDeviceGetClockInfo(void *device, int kind, unsigned *out) {
  (void)device;
  return kind == 1 ? number("sm_clock_mhz", out) : 3;
}
int nvmlDeviceGetUtilizationRates(void *device, unsigned *out) { (void)device; return number("utilization", out); }
int nvmlDeviceGetMemoryInfo(void *device, unsigned long long *out) {
  (void)device;
  out[0] = 80ull << 30;
  return answer("memory_used", &out[2]);
}
int nvmlDeviceGetCurrentClocksThrottleReasons(void *device, unsigned long long *out) {
  (void)device;
  return answer("reasons", out);
}
int nvmlDeviceGetTotalEccErrors(void *device, int kind, int counter, unsigned long long *out) {
  (void)device;
  return kind == 1 && counter == 0 ? answer("ecc", out) : 3;
}
