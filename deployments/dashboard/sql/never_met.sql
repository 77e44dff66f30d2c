-- What never met its contract, in whichever run: how many runs judged it, and the newest reason.
select output, max_by(model, run_id) as model, count(*) as runs,
    max_by(reason, run_id) as reason
from models where verdict in ('met', 'not_met')
group by output having count(*) filter (where verdict = 'met') = 0
order by output
