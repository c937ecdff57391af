/* Burgers' equation in one dimension, periodic, as a program that deepzero can ask. Copy it and put in your solver.
 *
 *     cc -O2 -o burgers1d burgers1d.c -lm
 *     burgers1d VISCOSITY DT [CRASH_AT]
 *
 * Standard input and output carry questions and answers, as the head of simulators/wire.py describes them:
 *
 *     step 1\n   velocity float64 2 N X\n   N*X numbers          →   done 1\n   velocity float64 2 N X\n   N*X numbers
 *
 * The domain has the length X; a step is upwind advection and explicit diffusion. A simulation that has left all bounds
 * comes out as not-a-number, and nobody minds. CRASH_AT makes the program crash on purpose at that question, the first
 * being 1, unless the file "crashed" shows in its folder of last time (set MARK to a path to let it crash only once).
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static double viscosity, dt;

/* u [cells], advanced in place; next [cells] is room to work in. */
static void advance(double *u, double *next, long cells) {
    for (long i = 0; i < cells; i++) {
        double here = u[i], left = u[(i + cells - 1) % cells], right = u[(i + 1) % cells];
        double slope = here > 0 ? here - left : right - here;
        next[i] = here - dt * here * slope + dt * viscosity * (left - 2 * here + right);
    }
    memcpy(u, next, (size_t)cells * sizeof *u);
}

static int complain(const char *what) {
    printf("error %s\n", what);
    fflush(stdout);
    return 1;
}

static void crash_on_purpose(void) {
    const char *mark = getenv("MARK");
    if (mark) {
        FILE *seen = fopen(mark, "r");
        if (seen) { /* it has crashed before */
            fclose(seen);
            return;
        }
        seen = fopen(mark, "w");
        if (seen) fclose(seen);
    }
    fprintf(stderr, "crashing on purpose\n");
    abort();
}

int main(int argc, char **argv) {
    if (argc < 3) {
        fprintf(stderr, "usage: burgers1d VISCOSITY DT [CRASH_AT]\n");
        return 2;
    }
    viscosity = atof(argv[1]);
    dt = atof(argv[2]);
    long crash_at = argc > 3 ? atol(argv[3]) : 0;

    int arrays;
    for (long question = 1; scanf("step %d", &arrays) == 1 && getchar() == '\n'; question++) {
        char name[64], type[16];
        long count, cells;
        if (arrays != 1) return complain("one array is expected, velocity");
        if (scanf("%63s %15s 2 %ld %ld", name, type, &count, &cells) != 4 || getchar() != '\n')
            return complain("the head of an array is expected: velocity float64 2 N X");
        if (strcmp(name, "velocity") || strcmp(type, "float64")) return complain("velocity must come in float64");

        size_t numbers = (size_t)(count * cells);
        double *u = malloc(numbers * sizeof *u), *room = malloc((size_t)cells * sizeof *room);
        if (!u || !room) return complain("out of memory");
        if (fread(u, sizeof *u, numbers, stdin) != numbers) return complain("the question ended too early");
        if (question == crash_at) crash_on_purpose();

        for (long n = 0; n < count; n++) advance(u + n * cells, room, cells);

        printf("done 1\nvelocity float64 2 %ld %ld\n", count, cells);
        fwrite(u, sizeof *u, numbers, stdout);
        fflush(stdout);
        free(u);
        free(room);
    }
    return 0;
}
