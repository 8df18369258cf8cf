package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"cal/internal/kvm"
	"cal/machine"
	"cal/machine/firecracker"
	"cal/machine/gvisor"
	"cal/machine/qemu"
	"cal/workspace"
	"cal/workspace/agents"
)

func agentCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "agent", Short: "Agents that CAL knows how to start", Example: "  cal agent list"}
	type found struct {
		Name    string `json:"name"`
		Version string `json:"version,omitempty"`
		Path    string `json:"path,omitempty"`
		Missing string `json:"missing,omitempty"`
		Hint    string `json:"hint,omitempty"`
	}
	var asJSON bool
	list := &cobra.Command{
		Use: "list", Short: "List the agents and where their installs lie", Example: "  cal agent list --json", Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			home, err := workspace.OpenHome()
			if err != nil {
				return err
			}
			var all []found
			for _, name := range home.AgentNames() {
				install, err := home.LocateAgent(cmd.Context(), name)
				f := found{Name: name, Version: install.Version, Path: install.Path}
				var missing *agents.Missing
				if errors.As(err, &missing) {
					f.Missing, f.Hint = missing.Fact, missing.Hint
				} else if err != nil {
					f.Missing = err.Error()
				}
				all = append(all, f)
			}
			return printList(all, asJSON, "AGENT\tVERSION\tWHERE", func(f found) string {
				if f.Hint != "" {
					f.Missing += " (" + f.Hint + ")"
				}
				if f.Missing != "" {
					return f.Name + "\t-\t" + f.Missing
				}
				return f.Name + "\t" + f.Version + "\t" + f.Path
			})
		},
	}
	list.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	cmd.AddCommand(list)
	return cmd
}

func doctorCommand() *cobra.Command {
	type check struct {
		Driver string `json:"driver"`
		Tier   string `json:"tier"`
		OK     bool   `json:"ok"`
		Cause  string `json:"cause,omitempty"`
		Mend   string `json:"mend,omitempty"`
		Remark string `json:"remark,omitempty"` // what would make machines stronger here
		Millis int64  `json:"ms"`
	}
	var asJSON bool
	cmd := &cobra.Command{
		Use: "doctor", Short: "Prove by running guest code which machines work here, and say the mend where not", Example: "  cal doctor", Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			runsc, err := workspace.Program("runsc")
			if err != nil {
				return err
			}
			var checks []check
			works := false
			vmm, _ := workspace.Program("firecracker") // which CAL does not bring: without it the probe says so
			jailer, _ := workspace.Program("jailer")
			proxy, err := workspace.Program("nucleus-tool-proxy")
			if err != nil {
				return err
			}
			home, err := workspace.OpenHome()
			if err != nil {
				return err
			}
			images, err := home.Images()
			if err != nil {
				return err
			}
			host := new(kvm.Host)
			accelerated, emulated := qemu.New(qemu.Config{Images: images, Proxy: proxy, Scratch: home.Probes(), KVM: host})
			for _, d := range []machine.Driver{
				firecracker.New(firecracker.Config{Firecracker: vmm, Jailer: jailer, Scratch: home.Probes(), KVM: host}), accelerated,
				gvisor.New(gvisor.Config{Runsc: runsc, Scratch: home.Probes()}), emulated,
			} {
				ctx, cancel := context.WithTimeout(cmd.Context(), time.Minute)
				started := time.Now()
				err := d.Probe(ctx)
				cancel()
				c := check{Driver: d.Name(), Tier: string(d.Tier()), OK: err == nil, Millis: time.Since(started).Milliseconds()}
				var failed *machine.ProbeError
				if errors.As(err, &failed) {
					c.Cause, c.Mend = failed.Error(), failed.Mend
				} else if err != nil {
					c.Cause = err.Error()
				}
				if d, ok := d.(interface{ Remark(context.Context) string }); ok && c.OK {
					c.Remark = d.Remark(cmd.Context())
				}
				works = works || c.OK && d.Tier().Satisfies("") // what is only taken by name is no answer to what works here
				checks = append(checks, c)
			}
			err = printList(checks, asJSON, "DRIVER\tTIER\tWORKS\tTIME\tCAUSE\tMEND", func(c check) string {
				return fmt.Sprintf("%s\t%s\t%v\t%d ms\t%s\t%s", c.Driver, c.Tier, c.OK, c.Millis, c.Cause, c.Mend)
			})
			for _, c := range checks {
				if c.Remark != "" && !asJSON {
					fmt.Fprintf(cmd.OutOrStdout(), "\n%s: %s\n", c.Driver, c.Remark)
				}
			}
			if err == nil && !works {
				err = errors.New("no machine can be started here")
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	return cmd
}
