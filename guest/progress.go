package guest

import (
	"context"
	"sync"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"
)

// progressEvery is how often a call that goes on says so: clients and what lies between give
// up a stream on which nothing comes.
const progressEvery = 10 * time.Second

// tell sends progress notifications for one call, where its client asked for them, until stop.
// told is given the id of an ask that a person has to answer, and says it at once.
func tell(ctx context.Context, req *mcp.CallToolRequest) (told func(ask string), stop func()) {
	token := req.Params.GetProgressToken()
	if token == nil {
		return nil, func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	asks := make(chan string, 1)
	var telling sync.WaitGroup
	telling.Go(func() {
		began := time.Now()
		message := "at work"
		tick := time.NewTicker(progressEvery)
		defer tick.Stop()
		for n := 1.0; ; n++ {
			select {
			case <-ctx.Done():
				return
			case ask := <-asks:
				message = "waits for a person to approve: cal approve " + ask
			case <-tick.C:
			}
			// A client that is not there ends the call by itself.
			_ = req.Session.NotifyProgress(ctx, &mcp.ProgressNotificationParams{
				ProgressToken: token, Progress: n, Message: message + ", " + time.Since(began).Round(time.Second).String(),
			})
		}
	})
	return func(ask string) {
			select {
			case asks <- ask:
			default: // told already
			}
		}, func() {
			cancel()
			telling.Wait()
		}
}
