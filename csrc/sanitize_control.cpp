// Two planted faults: csrc/sanitize.sh proves with them that the sanitizers are awake in a Python
// process.
#include <cstdint>

extern "C" __attribute__((visibility("default"))) float read_past_end(const float* x,
                                                                      int64_t numel) {
  return x[numel];
}

extern "C" __attribute__((visibility("default"))) int64_t overflow(int64_t x) {
  return x + INT64_MAX;
}
