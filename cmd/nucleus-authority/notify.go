package main

import (
	"context"
	"fmt"
	"os"
	"sync"

	"github.com/spf13/cobra"

	"cal/approval/client"
	"cal/authority/notify"
)

// teller says how a person is told of a new ask.
type teller struct {
	command []string
	desktop bool
}

func (t *teller) flags(cmd *cobra.Command) {
	cmd.Flags().StringArrayVar(&t.command, "notify", nil, "program, and its arguments, to run for a new ask; given once for each")
	cmd.Flags().BoolVar(&t.desktop, "desktop", false, "show a desktop notification for a new ask, where there is a session bus")
}

// start begins to tell; stop ends it and what still runs.
func (t *teller) start(ctx context.Context) (announce func(client.Item), stop func(), err error) {
	n := &notify.Notifier{Env: notify.Kept(os.Environ()), Failed: func(err error) { fmt.Fprintln(os.Stderr, "nucleus-authority: telling of an ask:", err) }}
	if t.desktop && notify.HasDesktop(os.Getenv) {
		// In a process of its own: what speaks with the bus is not where keys are opened.
		self, err := os.Executable()
		if err != nil {
			return nil, nil, err
		}
		n.Commands = append(n.Commands, []string{self, "desktop"})
	}
	if len(t.command) > 0 {
		n.Commands = append(n.Commands, t.command)
	}
	if len(n.Commands) == 0 {
		return nil, func() {}, nil
	}
	ctx, cancel := context.WithCancel(ctx)
	var telling sync.WaitGroup
	telling.Go(func() { n.Run(ctx) })
	return func(i client.Item) { n.Announce(notify.Note{Ask: i.ID, Pod: i.Pod, Op: i.Op}) }, func() {
		cancel()
		telling.Wait()
	}, nil
}

func (c *command) desktop() *cobra.Command {
	return &cobra.Command{
		Use: "desktop", Short: "Show a desktop notification for the ask that the environment names", Args: args(cobra.NoArgs),
		Long:    "Show a desktop notification for the ask that the environment names. serve --desktop runs it for each new ask. It shows\nids and the operation, and no word that an agent wrote; nothing that is clicked there decides.",
		Example: "  CAL_ASK=a-QFZ2EXAMPLE CAL_POD=p-example CAL_OPERATION=git_push CAL_MORE=0 nucleus-authority desktop",
		RunE: func(cmd *cobra.Command, _ []string) error {
			note, err := notify.FromEnv(os.Getenv)
			if err != nil {
				return usageError{err}
			}
			return notify.Desktop(cmd.Context(), note, os.Getenv)
		},
	}
}
