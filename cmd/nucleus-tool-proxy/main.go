// Command nucleus-tool-proxy is the part of CAL inside a machine. Machines start
// it; nobody else needs to.
package main

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"

	"cal/guest"
	"cal/guest/boot"
)

const usage = `nucleus-tool-proxy runs inside a machine and is started by its driver.

  init                 serve the machine; the wire is descriptor 3
  attach               hand a new wire (descriptor 3) to the running proxy
  jail                 the tools' side and the agent's, started by init
  agent-init -- ARGV   the first process of the agent's namespace
  probe                say that guest code runs here
`

func main() {
	if boot.IsInit() { // the first process of a machine with a kernel of its own
		boot.Main()
	}
	code, err := run(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "nucleus-tool-proxy:", err)
		if code == 0 {
			code = 1
		}
	}
	os.Exit(code)
}

func run(args []string) (int, error) {
	if len(args) == 0 {
		fmt.Fprint(os.Stderr, usage)
		return 2, nil
	}
	// Under gVisor a wake-up across threads costs more than the work that it shares
	// out: one thread that runs Go halves the time of a small call.
	runtime.GOMAXPROCS(1)
	// Half of Go's usual heap between two collections: there are two such processes
	// in each machine, and what lives in them is small.
	debug.SetGCPercent(50)
	switch args[0] {
	case "init":
		return 0, guest.Init(context.Background())
	case "attach":
		return 0, guest.Attach()
	case "jail":
		return 0, guest.RunJail()
	case "agent-init":
		if len(args) < 3 || args[1] != "--" {
			return 2, fmt.Errorf("agent-init -- ARGV")
		}
		return guest.AgentInit(args[2:])
	case "probe":
		fmt.Println("guest code runs here")
		return 0, nil
	}
	fmt.Fprint(os.Stderr, usage)
	return 2, nil
}
