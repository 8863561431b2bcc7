/* The guest's part of ci/linux-gap: writes to memory, and prints the longest time between two of its looks at
 * the clock in each half second.
 *
 *   gap MIB PAGES_A_SECOND
 *
 * A guest that stands, or waits for its host, misses that time. Printing is not counted: the serial port takes
 * the host a while.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { PAGE = 4096, AT_ONCE = 64 };

static uint64_t now_us(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (uint64_t)time.tv_sec * 1000000 + (uint64_t)time.tv_nsec / 1000;
}

int main(int count, char **arguments) {
  if (count != 3) {
    return 2;
  }
  size_t size = (size_t)atoi(arguments[1]) << 20;
  uint64_t rate = strtoull(arguments[2], NULL, 10);
  unsigned char *memory = malloc(size);
  if (!memory || size < PAGE) {
    return 1;
  }
  memset(memory, 1, size);
  printf("gap: ready\n");
  fflush(stdout);
  uint64_t start = now_us(), last = start, told = start, longest = 0, pages = 0;
  for (;;) {
    uint64_t now = now_us();
    if (now - last > longest) {
      longest = now - last;
    }
    last = now;
    uint64_t wanted = (now - start) / 1000 * rate / 1000;
    for (int n = 0; n < AT_ONCE && pages < wanted; n++, pages++) {
      memory[pages * PAGE % size]++;
    }
    if (now - told >= 500000) {
      printf("gap: longest_us=%llu pages=%llu\n", (unsigned long long)longest, (unsigned long long)pages);
      fflush(stdout);
      longest = 0;
      told = last = now_us();
    }
  }
}
