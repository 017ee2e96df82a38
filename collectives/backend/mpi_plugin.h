/* What the MPI plug-in (libshoal_mpi.so, loaded at run time) gives the core: MPI's non-blocking collectives as plain C, so that
 * the core links no MPI and the plug-in no C++. Calls come from one thread at a time. Functions that can fail return an
 * MPI error code, 0 on success. */
#ifndef SHOAL_COLLECTIVES_BACKEND_MPI_PLUGIN_H_
#define SHOAL_COLLECTIVES_BACKEND_MPI_PLUGIN_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SHOAL_MPI_PLUGIN_VERSION 1
#define SHOAL_MPI_PLUGIN_SYMBOL "shoal_mpi_plugin_table"

typedef struct shoal_mpi_group shoal_mpi_group;     /* A communicator. */
typedef struct shoal_mpi_request shoal_mpi_request; /* One operation in flight. */

/* in_out[i] = in[i] op in_out[i], for the 16-bit floats, which MPI does not know; `dtype` and `op` as in c_api.h. */
typedef void (*shoal_mpi_reduce)(int dtype, int op, const void *in, void *in_out, int64_t count);

enum shoal_mpi_kind {
  SHOAL_MPI_ALL_REDUCE,
  SHOAL_MPI_REDUCE_SCATTER,
  SHOAL_MPI_ALL_GATHER,
  SHOAL_MPI_ALL_TO_ALL,
  SHOAL_MPI_BROADCAST,
  SHOAL_MPI_REDUCE,
  SHOAL_MPI_GATHER,
  SHOAL_MPI_SCATTER,
  SHOAL_MPI_BARRIER,
  SHOAL_MPI_SEND,
  SHOAL_MPI_RECEIVE
};

/* Counts are elements and fit an int. Arrays have an entry per rank and are copied. `in` equals `out`: in place, as
 * communicator.h says. */
typedef struct shoal_mpi_op {
  int kind, dtype, op;
  int peer; /* The root, or the other rank. */
  int tag;
  const void *in;
  void *out;
  int64_t count;
  const int64_t *counts, *recv_counts;
} shoal_mpi_op;

typedef struct shoal_mpi_plugin {
  int version;
  const char *(*library)(void); /* Name and version of the MPI library. */
  /* Initialises MPI unless somebody has. */
  int (*start)(shoal_mpi_reduce reduce, shoal_mpi_group **world);
  int (*rank)(const shoal_mpi_group *group);
  int (*size)(const shoal_mpi_group *group);
  /* Collective over `members`, indices of `group`. */
  int (*split)(shoal_mpi_group *group, const int *members, int count, shoal_mpi_group **part);
  void (*free_group)(shoal_mpi_group *group);
  int (*begin)(shoal_mpi_group *group, const shoal_mpi_op *op, shoal_mpi_request **request);
  /* *done: the operation ended and the request is freed. */
  int (*test)(shoal_mpi_request *request, int *done);
  /* A text to one rank of the group, beside all operations. Does not block. */
  int (*tell)(shoal_mpi_group *group, int rank, const char *text);
  /* 1: a text came from `*from`. */
  int (*heard)(shoal_mpi_group *group, int *from, char *text, int text_bytes);
  /* Finalises MPI if `start` initialised it. */
  void (*stop)(void);
  void (*error_text)(int error, char *text, int text_bytes);
} shoal_mpi_plugin;

#ifdef __cplusplus
}
#endif
#endif /* SHOAL_COLLECTIVES_BACKEND_MPI_PLUGIN_H_ */
