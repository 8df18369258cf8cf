package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"cal/nucleus"
)

// resident is the memory of one process of the machine, in KiB, as the host's kernel
// counts it: pages that are there. Pages of the program are shared by all that run it.
type resident struct {
	total, program int
}

// proxyMemory says how large proxy and tools worker are. The guest's kernel counts
// what it has set aside, for a program in Go mostly in units of 2 MiB, and so tells
// much more than there is; the host's kernel counts pages.
func (s *stage) proxyMemory(ctx context.Context, pod string) []string {
	lines := []string{"| | RSS, the host's count | of it the program's pages | VmRSS, the guest's count |", "|---|---|---|---|"}
	processes, err := s.proxies(pod)
	if err != nil {
		return []string{fmt.Sprintf("Memory of the proxy not measured: %v.", err)}
	}
	for i, name := range []string{"proxy", "tools worker"} {
		guest := "not visible from the tools' namespace"
		if name == "tools worker" {
			guest = s.guestCount(ctx, pod)
		}
		lines = append(lines, fmt.Sprintf("| %s | %d kB | %d kB | %s |", name, processes[i].total, processes[i].program, guest))
	}
	return lines
}

// proxies are the processes that run the proxy's program, in the order in which they
// were started: the proxy, then the tools worker.
func (s *stage) proxies(pod string) ([]resident, error) {
	sandbox, children, err := s.sandbox(pod)
	if err != nil {
		return nil, err
	}
	slices.Sort(children)
	var found []resident
	for _, pid := range children {
		maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
		if err != nil {
			return nil, err
		}
		if r := readSmaps(maps); r.program > 0 {
			found = append(found, r)
		}
	}
	if len(found) != 2 {
		return nil, fmt.Errorf("%d processes of sandbox %d run the proxy's program, want 2", len(found), sandbox)
	}
	return found, nil
}

// sandbox finds the machine of a pod and its processes: gVisor has one of the host for
// each of the guest.
func (s *stage) sandbox(pod string) (pid int, children []int, err error) {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return 0, nil, err
	}
	parents := map[int]int{}
	for _, name := range stats {
		of, _ := strconv.Atoi(filepath.Base(filepath.Dir(name)))
		stat, err := os.ReadFile(name)
		if err != nil {
			continue // it has ended
		}
		fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		parents[of], _ = strconv.Atoi(fields[1])
		argv, err := os.ReadFile(filepath.Join(filepath.Dir(name), "cmdline"))
		if err == nil && bytes.HasPrefix(argv, []byte("runsc-sandbox")) && bytes.Contains(argv, []byte(filepath.Join(s.home, "run", "pods", pod)+"/")) {
			pid = of
		}
	}
	if pid == 0 {
		return 0, nil, errors.New("no sandbox is found among the host's processes")
	}
	for child, parent := range parents {
		if parent == pid {
			children = append(children, child)
		}
	}
	return pid, children, nil
}

func readSmaps(maps []byte) resident {
	var r resident
	program := false
	for line := range strings.Lines(string(maps)) {
		fields := strings.Fields(line)
		switch {
		case len(fields) >= 5 && strings.Contains(fields[0], "-"):
			program = strings.HasSuffix(fields[len(fields)-1], "/nucleus-tool-proxy")
		case len(fields) == 3 && fields[0] == "Rss:":
			size, _ := strconv.Atoi(fields[1])
			r.total += size
			if program {
				r.program += size
			}
		}
	}
	return r
}

// guestCount asks the worker, which is the first process of the tools' namespace.
func (s *stage) guestCount(ctx context.Context, pod string) string {
	value, err := s.node.Tool(ctx, pod, nucleus.RunBash, map[string]any{"argv": []string{"sed", "-n", "s/VmRSS:[^0-9]*//p", "/proc/1/status"}})
	if err != nil {
		return err.Error()
	}
	var result struct {
		Stdout string `json:"stdout"`
	}
	if err := json.Unmarshal(value, &result); err != nil {
		return err.Error()
	}
	return strings.TrimSpace(result.Stdout)
}
