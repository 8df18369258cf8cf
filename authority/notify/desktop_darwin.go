package notify

import (
	"context"
	"fmt"
	"os/exec"
)

// HasDesktop reports whether notifications can be shown: they always can.
func HasDesktop(func(string) string) bool { return true }

// Desktop shows a note in the notification centre. The texts are arguments of the script, not
// a part of it.
func Desktop(ctx context.Context, note Note, _ func(string) string) error {
	const script = "on run argv\ndisplay notification (item 2 of argv) with title (item 1 of argv)\nend run"
	title, body := note.Text()
	if out, err := exec.CommandContext(ctx, "/usr/bin/osascript", "-e", script, title, body).CombinedOutput(); err != nil {
		return fmt.Errorf("osascript: %w: %.200s", err, out)
	}
	return nil
}
