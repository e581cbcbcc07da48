"""Short reports of seven kinds with their summaries: what the model learns to summarize.

A report is made of sentences with values in them and of sentences that do not matter. It knows nothing about prompts.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from ops.demo_model.tasks import noise
from ops.demo_model.tasks.example import Language
from ops.demo_model.tasks.facts import person_name
from ops.demo_model.tasks.words import words


@dataclass(frozen=True, slots=True)
class Report:
    text: str
    key: str
    """One sentence with what matters."""
    title: str
    bullets: tuple[str, ...]


class _Drawn:
    """Draws the values of one report by name; pools keep their last sixth for the evaluation."""

    def __init__(self, rng: random.Random, language: Language, held_out: bool) -> None:
        self.rng, self.language, self.held_out = rng, language, held_out

    def __call__(self, name: str) -> str:
        values = words(self.language, "report", name)
        cut = len(values) - len(values) // 6
        if self.held_out and cut < len(values) and self.rng.random() < 0.5:
            return self.rng.choice(values[cut:])
        if not self.held_out and name not in ("supply", "sport") and self.rng.random() < 0.08:
            return noise.phrase(
                self.rng,
                self.language,
                self.rng.randint(2, 5) if self.language == "zh" else self.rng.randint(1, 3),
            )
        return self.rng.choice(values[:cut] if cut else values)

    def two(self, name: str) -> tuple[str, str]:
        first, second = self(name), self(name)
        while second == first:
            second = self(name)
        return first, second

    def date(self) -> str:
        rng = self.rng
        month, day = rng.randint(1, 12), rng.randint(1, 28)
        if self.language == "en":
            return f"{words('en', 'calendar', 'month')[month - 1]} {day}"
        return (
            f"{month}月{day}日"
            if rng.random() < 0.8
            else rng.choice(("昨天", "上周六", "本周日", "近日", "今天"))
        )

    def weekday(self) -> str:
        return self.rng.choice(words(self.language, "calendar", "weekday"))

    def person(self) -> str:
        return person_name(self.rng, self.language)

    def number(self, low: int, high: int, step: int = 1) -> str:
        return str(self.rng.randrange(low, high + 1, step))

    def one(self, *texts: str) -> str:
        return self.rng.choice(texts)


def _event_zh(d: _Drawn) -> Report:
    date, org, place, event, n = d.date(), d("org"), d("place"), d("event"), d.number(20, 3000, 10)
    a, b = d.two("act")
    first = d.one(
        f"{date}，{org}在{place}举办了{event}。",
        f"由{org}主办的{event}{date}在{place}举行。",
        f"{date}，{event}在{place}举行，主办方是{org}。",
    )
    count = d.one(
        f"共有{n}人参加。", f"参加者达到{n}人。", f"据统计，到场人数为{n}人。", f"{n}名市民参加了活动。"
    )
    acts = d.one(f"现场安排了{a}和{b}。", f"活动包括{a}、{b}等内容。", f"除了{a}，还有{b}。")
    return _mix(
        d,
        [first, count, acts],
        f"{date}，{org}在{place}举办{event}，{n}人参加。",
        f"{org}举办{event}",
        (f"时间：{date}", f"地点：{place}", f"主办：{org}", f"内容：{event}", f"人数：{n}人"),
    )


def _study_zh(d: _Drawn) -> Report:
    univ, n, group, months, habit, effect, p, name = (
        d("univ"),
        d.number(100, 9000, 50),
        d("group"),
        d.number(3, 36),
        d("habit"),
        d("effect"),
        d.number(8, 60),
        d.person(),
    )
    first = d.one(
        f"{univ}的研究人员对{n}名{group}进行了{months}个月的跟踪调查。",
        f"{univ}最近公布了一项研究，{n}名{group}参加，历时{months}个月。",
        f"一项由{univ}开展的研究观察了{n}名{group}，时间为{months}个月。",
    )
    found = d.one(
        f"结果显示，每天{habit}的人患{effect}的风险降低了{p}%。",
        f"研究发现，每天{habit}可使{effect}的风险下降{p}%。",
        f"数据表明，坚持每天{habit}，{effect}的风险能减少{p}%。",
    )
    said = d.one(
        f"研究负责人{name}说，还需要更大规模的研究。",
        f"{name}教授提醒，运动和饮食要循序渐进。",
        f"负责这项研究的{name}表示，结果令人鼓舞。",
    )
    return _mix(
        d,
        [first, found, said],
        f"{univ}研究发现，每天{habit}可使{effect}的风险降低{p}%。",
        f"研究：每天{habit}可降低{effect}风险",
        (
            f"机构：{univ}",
            f"对象：{n}名{group}",
            f"时间：{months}个月",
            f"发现：每天{habit}，{effect}风险降低{p}%",
        ),
    )


def _notice_zh(d: _Drawn) -> Report:
    reason, area, supply, date = d("reason"), d("area"), d("supply"), d.date()
    t1 = d.rng.randint(6, 14)
    start, end = f"{t1}点", f"{t1 + d.rng.randint(2, 9)}点"
    phone = d.number(10000, 99999)
    first = d.one(
        f"因{reason}，{area}将于{date}{start}至{end}停{supply}。",
        f"接到通知，{date}{start}至{end}，{area}因{reason}停{supply}。",
        f"{area}的居民请注意：由于{reason}，{date}{start}至{end}停{supply}。",
    )
    more = d.one(
        "请居民提前做好准备。",
        "请提前安排好生活。",
        "恢复之后请先打开阀门检查。",
        "给大家带来不便，敬请谅解。",
    )
    call = d.one(f"咨询电话是{phone}。", f"有疑问请拨打{phone}。", f"如有问题，可致电{phone}。")
    return _mix(
        d,
        [first, more, call],
        f"{area}因{reason}将于{date}{start}至{end}停{supply}，咨询电话{phone}。",
        f"{area}停{supply}通知",
        (f"地区：{area}", f"时间：{date}{start}至{end}", f"原因：{reason}", f"电话：{phone}"),
    )


def _match_zh(d: _Drawn) -> Report:
    (win, lose), sport, place, player = d.two("team"), d("sport"), d("place"), d.person()
    low = d.rng.randint(40, 90)
    score, points, crowd = f"{low + d.rng.randint(1, 30)}比{low}", d.number(10, 45), d.number(200, 9000, 100)
    first = d.one(
        f"{win}以{score}战胜{lose}。",
        f"在{sport}联赛中，{win}{score}击败了{lose}。",
        f"昨晚的{sport}比赛，{lose}不敌{win}，比分是{score}。",
    )
    star = d.one(
        f"{player}一人得到{points}分，表现最好。",
        f"全场得分最高的是{player}，拿下{points}分。",
        f"{player}独得{points}分，成为最佳球员。",
    )
    where = d.one(f"比赛在{place}进行，现场观众{crowd}人。", f"{crowd}名观众来到{place}观看了比赛。")
    return _mix(
        d,
        [first, star, where],
        f"{win}以{score}战胜{lose}，{player}得到{points}分。",
        f"{win}战胜{lose}",
        (f"结果：{win}{score}胜{lose}", f"最佳：{player}，{points}分", f"地点：{place}", f"观众：{crowd}人"),
    )


def _meeting_zh(d: _Drawn) -> Report:
    dept, date, topic, decision, name, deadline = (
        d("dept"),
        d.date(),
        d("topic"),
        d("decision"),
        d.person(),
        f"{d.number(1, 12)}月底",
    )
    first = d.one(
        f"{date}，{dept}召开会议，讨论{topic}。",
        f"{dept}{date}开会讨论了{topic}。",
        f"关于{topic}，{dept}在{date}开了一次会。",
    )
    made = d.one(f"会议决定{decision}。", f"经过讨论，大家同意{decision}。", f"最后的决定是{decision}。")
    who = d.one(
        f"由{name}负责，{deadline}前完成。",
        f"这项工作交给{name}，要求{deadline}前完成。",
        f"{name}将在{deadline}前落实。",
    )
    return _mix(
        d,
        [first, made, who],
        f"{dept}决定{decision}，由{name}负责，{deadline}前完成。",
        f"{dept}决定{decision}",
        (f"议题：{topic}", f"决定：{decision}", f"负责人：{name}", f"期限：{deadline}前"),
    )


def _clinic_zh(d: _Drawn) -> Report:
    hosp, clinic, date, day, name, fee, room = (
        d("hosp"),
        d("clinic"),
        d.date(),
        d.weekday(),
        d.person(),
        d.number(10, 100, 5),
        d.number(101, 909),
    )
    first = d.one(
        f"{hosp}{date}起开设{clinic}门诊。",
        f"从{date}开始，{hosp}新开{clinic}门诊。",
        f"{date}，{hosp}的{clinic}门诊正式开诊。",
    )
    when = d.one(
        f"每{day}由{name}医生出诊。", f"{name}医生每{day}坐诊。", f"出诊的是{name}医生，时间是每{day}。"
    )
    cost = d.one(
        f"挂号费{fee}元，地点在{room}室。",
        f"诊室在{room}室，挂号费为{fee}元。",
        f"挂号需要{fee}元，请到{room}室就诊。",
    )
    return _mix(
        d,
        [first, when, cost],
        f"{hosp}{date}起开设{clinic}门诊，每{day}由{name}医生出诊，挂号费{fee}元。",
        f"{hosp}开设{clinic}门诊",
        (f"医院：{hosp}", f"门诊：{clinic}", f"医生：{name}，每{day}", f"费用：{fee}元", f"诊室：{room}室"),
    )


def _weather_zh(d: _Drawn) -> Report:
    city, date, weather, advice = d("city"), d.date(), d("weather"), d("advice")
    low = d.rng.randint(-10, 28)
    temps = f"{low}到{low + d.rng.randint(4, 12)}度"
    first = d.one(
        f"{city}气象台预报，{date}将出现{weather}。",
        f"预计{date}{city}有{weather}。",
        f"{date}，{weather}将影响{city}。",
    )
    temp = d.one(f"气温{temps}。", f"当天气温为{temps}。", f"气温在{temps}之间。")
    tell = d.one(f"专家建议市民{advice}。", f"气象台提醒大家{advice}。", f"请市民{advice}。")
    return _mix(
        d,
        [first, temp, tell],
        f"{city}{date}有{weather}，气温{temps}，请市民{advice}。",
        f"{city}将有{weather}",
        (f"地区：{city}", f"时间：{date}", f"天气：{weather}，{temps}", f"建议：{advice}"),
    )


def _event_en(d: _Drawn) -> Report:
    date, org, place, event, n = d.date(), d("org"), d("place"), d("event"), d.number(20, 3000, 10)
    a, b = d.two("act")
    first = d.one(
        f"On {date}, {org} held {event} at {place}.",
        f"{_up(org)} held {event} at {place} on {date}.",
        f"At {place}, {org} invited people to {event} on {date}.",
    )
    count = d.one(
        f"{n} people took part.",
        f"In all {n} people came.",
        f"The number of visitors was {n}.",
        f"There were {n} guests.",
    )
    acts = d.one(
        f"There was {a} and {b}.", f"Visitors enjoyed {a} and {b}.", f"The program offered {a}, and also {b}."
    )
    return _mix(
        d,
        [first, count, acts],
        f"On {date}, {org} held {event} at {place}, and {n} people took part.",
        f"{_up(org)} held {event}",
        (f"Date: {date}", f"Place: {place}", f"Host: {org}", f"Event: {event}", f"Visitors: {n}"),
    )


def _study_en(d: _Drawn) -> Report:
    univ, n, group, months, habit, effect, p, name = (
        d("univ"),
        d.number(100, 9000, 50),
        d("group"),
        d.number(3, 36),
        d("habit"),
        d("effect"),
        d.number(8, 60),
        d.person(),
    )
    first = d.one(
        f"Researchers of {univ} followed {n} {group} for {months} months.",
        f"{_up(univ)} has published a study of {n} {group} over {months} months.",
        f"A study by {univ} looked at {n} {group} for {months} months.",
    )
    found = d.one(
        f"It found that {habit} every day lowers the risk of {effect} by {p}%.",
        f"The result: {habit} every day cut the risk of {effect} by {p}%.",
        f"According to the data, {habit} every day reduces the risk of {effect} by {p}%.",
    )
    said = d.one(
        f"{name}, who led the study, said that more research is needed.",
        f"Professor {name} called the result encouraging.",
        f"The lead author, {name}, advises to start slowly.",
    )
    return _mix(
        d,
        [first, found, said],
        f"A study by {univ} found that {habit} every day lowers the risk of {effect} by {p}%.",
        f"Study: {habit} lowers the risk of {effect}",
        (
            f"Institute: {univ}",
            f"Subjects: {n} {group}",
            f"Duration: {months} months",
            f"Finding: {habit} every day lowers the risk of {effect} by {p}%",
        ),
    )


def _notice_en(d: _Drawn) -> Report:
    reason, area, supply, date = d("reason"), d("area"), d("supply"), d.date()
    t1 = d.rng.randint(6, 14)
    start, end = f"{t1}:00", f"{t1 + d.rng.randint(2, 9)}:00"
    phone = d.number(10000, 99999)
    first = d.one(
        f"Because of {reason}, {area} will have no {supply} on {date} from {start} to {end}.",
        f"There will be no {supply} in {area} on {date} from {start} to {end} because of {reason}.",
        f"People in {area} should know: {reason} will stop the {supply} on {date} from {start} to {end}.",
    )
    more = d.one(
        "Please prepare in time.",
        "We are sorry for the trouble.",
        "Please check your taps and switches afterwards.",
    )
    call = d.one(
        f"For questions call {phone}.",
        f"The number for questions is {phone}.",
        f"Call {phone} to learn more.",
    )
    return _mix(
        d,
        [first, more, call],
        f"{_up(area)} will have no {supply} on {date} from {start} to {end} because of {reason}; call {phone} for questions.",
        f"No {supply} in {area}",
        (f"Area: {area}", f"Time: {date}, {start} to {end}", f"Reason: {reason}", f"Phone: {phone}"),
    )


def _match_en(d: _Drawn) -> Report:
    (win, lose), sport, place, player = d.two("team"), d("sport"), d("place"), d.person()
    low = d.rng.randint(40, 90)
    score, points, crowd = (
        f"{low + d.rng.randint(1, 30)} to {low}",
        d.number(10, 45),
        d.number(200, 9000, 100),
    )
    first = d.one(
        f"{_up(win)} beat {lose} {score}.",
        f"In the {sport} league, {win} won {score} against {lose}.",
        f"{_up(lose)} lost to {win} in {sport} last night; the score was {score}.",
    )
    star = d.one(
        f"{player} scored {points} points and was the best player.",
        f"The best player was {player} with {points} points.",
        f"With {points} points, {player} was the star of the night.",
    )
    where = d.one(f"The game at {place} was watched by {crowd} people.", f"{crowd} fans came to {place}.")
    return _mix(
        d,
        [first, star, where],
        f"{_up(win)} beat {lose} {score}, with {points} points by {player}.",
        f"{_up(win)} beat {lose}",
        (
            f"Result: {win} beat {lose} {score}",
            f"Best player: {player}, {points} points",
            f"Place: {place}",
            f"Crowd: {crowd}",
        ),
    )


def _meeting_en(d: _Drawn) -> Report:
    dept, date, topic, decision, name = d("dept"), d.date(), d("topic"), d("decision"), d.person()
    deadline = d.rng.choice(words("en", "calendar", "month"))
    first = d.one(
        f"On {date}, {dept} met to discuss {topic}.",
        f"{_up(dept)} talked about {topic} on {date}.",
        f"The subject of a meeting of {dept} on {date} was {topic}.",
    )
    made = d.one(
        f"It was decided to {decision}.", f"They agreed to {decision}.", f"The decision is to {decision}."
    )
    who = d.one(
        f"{name} is responsible and should finish by the end of {deadline}.",
        f"The work was given to {name} and must be done by the end of {deadline}.",
        f"{name} will see to it by the end of {deadline}.",
    )
    return _mix(
        d,
        [first, made, who],
        f"{_up(dept)} decided to {decision}; {name} will do it by the end of {deadline}.",
        f"{_up(dept)} decided to {decision}",
        (
            f"Subject: {topic}",
            f"Decision: {decision}",
            f"Responsible: {name}",
            f"Deadline: end of {deadline}",
        ),
    )


def _clinic_en(d: _Drawn) -> Report:
    hosp, clinic, date, day, name, fee, room = (
        d("hosp"),
        d("clinic"),
        d.date(),
        d.weekday(),
        d.person(),
        d.number(10, 100, 5),
        d.number(101, 909),
    )
    first = d.one(
        f"{_up(hosp)} opens a {clinic} clinic on {date}.",
        f"From {date}, {hosp} offers a {clinic} clinic.",
        f"A {clinic} clinic opens at {hosp} on {date}.",
    )
    when = d.one(
        f"Doctor {name} sees patients every {day}.",
        f"Every {day}, Doctor {name} is there for patients.",
        f"The doctor is {name}, and the day is {day}.",
    )
    cost = d.one(
        f"A visit costs {fee} dollars, in room {room}.",
        f"The room is {room}, and the fee is {fee} dollars.",
        f"Patients pay {fee} dollars and go to room {room}.",
    )
    return _mix(
        d,
        [first, when, cost],
        f"{_up(hosp)} opens a {clinic} clinic on {date}, every {day} with Doctor {name}, for {fee} dollars.",
        f"{_up(hosp)} opens a {clinic} clinic",
        (
            f"Hospital: {hosp}",
            f"Clinic: {clinic}",
            f"Doctor: {name}, every {day}",
            f"Fee: {fee} dollars",
            f"Room: {room}",
        ),
    )


def _weather_en(d: _Drawn) -> Report:
    city, date, weather, advice = d("city"), d.date(), d("weather"), d("advice")
    low = d.rng.randint(-10, 28)
    temps = f"{low} to {low + d.rng.randint(4, 12)} degrees"
    first = d.one(
        f"The forecast for {city} on {date} is {weather}.",
        f"On {date}, {weather} is expected in {city}.",
        f"{_up(weather)} will reach {city} on {date}.",
    )
    temp = d.one(f"It will be {temps}.", f"The temperature is {temps}.", f"Expect {temps}.")
    tell = d.one(
        f"People should {advice}.",
        f"Experts advise people to {advice}.",
        f"The weather service asks people to {advice}.",
    )
    return _mix(
        d,
        [first, temp, tell],
        f"{city} expects {weather} on {date}, with {temps}; people should {advice}.",
        f"{_up(weather)} in {city}",
        (f"Place: {city}", f"Date: {date}", f"Weather: {weather}, {temps}", f"Advice: {advice}"),
    )


def _up(text: str) -> str:
    return text[0].upper() + text[1:]


def _mix(d: _Drawn, sentences: list[str], key: str, title: str, bullets: tuple[str, ...]) -> Report:
    """The sentences in their order with some that do not matter between them."""
    rng = d.rng
    filler = rng.sample(words(d.language, "report", "filler"), rng.choice((0, 1, 1, 2, 3)))
    if rng.random() < 0.15:
        filler.append(noise.sentence(rng, d.language))
    if len(sentences) == 3 and rng.random() < 0.25:
        sentences = [sentences[0], sentences[2], sentences[1]]
    for text in filler:
        sentences.insert(rng.randint(0 if rng.random() < 0.15 else 1, len(sentences)), text)
    return Report(("" if d.language == "zh" else " ").join(map(_up, sentences)), key, title, bullets)


_KINDS: dict[Language, tuple[Callable[[_Drawn], Report], ...]] = {
    "zh": (_event_zh, _study_zh, _notice_zh, _match_zh, _meeting_zh, _clinic_zh, _weather_zh),
    "en": (_event_en, _study_en, _notice_en, _match_en, _meeting_en, _clinic_en, _weather_en),
}


def draw(rng: random.Random, language: Language, held_out: bool = False) -> Report:
    """One report of any kind; with `held_out` with values that training never uses."""
    return rng.choice(_KINDS[language])(_Drawn(rng, language, held_out))
