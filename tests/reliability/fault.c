/* Preloaded into a run: the FAULT_AT-th write call below FAULT_UNDER fails once, as on a full disk.

   FAULT_COUNT is a file of eight bytes that counts these calls. Writes to *.log files never fail. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static uint64_t *counter(void) {
  static uint64_t *shared;
  const char *path = getenv("FAULT_COUNT");
  if (!shared && path) {
    int fd = REAL(open)(path, O_RDWR);
    if (fd >= 0) {
      void *mapped = mmap(NULL, 8, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
      close(fd);
      if (mapped != MAP_FAILED) shared = mapped;
    }
  }
  return shared;
}

static int fails(const char *path) {
  const char *under = getenv("FAULT_UNDER"), *at = getenv("FAULT_AT");
  size_t length = strlen(path);
  if (!under || !at || strncmp(path, under, strlen(under))) return 0;
  if (length > 4 && !strcmp(path + length - 4, ".log")) return 0;
  uint64_t *count = counter();
  if (!count) return 0;
  if (__atomic_add_fetch(count, 1, __ATOMIC_SEQ_CST) != strtoull(at, NULL, 10)) return 0;
  errno = ENOSPC;
  return 1;
}

static int fails_open_file(int fd) {
  char link[64], path[PATH_MAX];
  if (!getenv("FAULT_AT")) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length <= 0) return 0;
  path[length] = 0;
  return fails(path);
}

#define ON_FILE(type, name, parameters, arguments) \
  type name parameters { return fails_open_file(fd) ? -1 : REAL(name) arguments; }
ON_FILE(ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size))
ON_FILE(ssize_t, pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
ON_FILE(ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at))
ON_FILE(ssize_t, writev, (int fd, const struct iovec *parts, int count), (fd, parts, count))
ON_FILE(ssize_t, pwritev, (int fd, const struct iovec *parts, int count, off_t at), (fd, parts, count, at))
ON_FILE(int, fsync, (int fd), (fd))
ON_FILE(int, fdatasync, (int fd), (fd))
ON_FILE(int, ftruncate, (int fd, off_t size), (fd, size))
ON_FILE(int, ftruncate64, (int fd, off64_t size), (fd, size))

#define ON_PATH(name, parameters, path, arguments) \
  int name parameters { return fails(path) ? -1 : REAL(name) arguments; }
ON_PATH(rename, (const char *from, const char *to), to, (from, to))
ON_PATH(renameat, (int a, const char *from, int b, const char *to), to, (a, from, b, to))
ON_PATH(link, (const char *from, const char *to), to, (from, to))
ON_PATH(mkdir, (const char *path, mode_t mode), path, (path, mode))
ON_PATH(mkdirat, (int folder, const char *path, mode_t mode), path, (folder, path, mode))

#define ON_OPEN(name, parameters, arguments)                 \
  int name parameters {                                      \
    mode_t mode = 0;                                         \
    if (flags & (O_CREAT | O_TMPFILE)) {                     \
      va_list more;                                          \
      va_start(more, flags);                                 \
      mode = va_arg(more, mode_t);                           \
      va_end(more);                                          \
    }                                                        \
    if ((flags & O_CREAT) && fails(path)) return -1;         \
    return REAL(name) arguments;                             \
  }
ON_OPEN(open, (const char *path, int flags, ...), (path, flags, mode))
ON_OPEN(open64, (const char *path, int flags, ...), (path, flags, mode))
ON_OPEN(openat, (int folder, const char *path, int flags, ...), (folder, path, flags, mode))
ON_OPEN(openat64, (int folder, const char *path, int flags, ...), (folder, path, flags, mode))
